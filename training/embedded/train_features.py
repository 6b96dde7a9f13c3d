"""Train the feature network on emoji scenes: ``python -m training.embedded.train_features``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from pdmd_core.arguments import SEED, whole_number
from training.embedded.emoji import BACKGROUNDS, EMOJI, EmojiScenes
from training.embedded.features import FOLDER, EmojiFeatures, save_features
from training.embedded.train_autoencoder import learning_rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=whole_number(0), default=1200, help="updates of 64 pictures")
    parser.add_argument("--seed", type=SEED, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    scenes = EmojiScenes(arguments.seed + 2)
    network = EmojiFeatures(len(EMOJI), len(BACKGROUNDS))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.02)
    bar = tqdm(range(arguments.steps), mininterval=10)
    for step in bar:
        optimizer.param_groups[0]["lr"] = learning_rate(step, arguments.steps, 2e-3)
        emoji_loss, background_loss, right = losses(network, scenes, 64)
        (emoji_loss + background_loss).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            bar.set_postfix(loss=f"{emoji_loss.item():.3f}", right=f"{right:.3f}")
    with torch.no_grad():
        network.eval()
        print(f"emoji named correctly on 1000 new pictures: {losses(network, EmojiScenes(99), 1000)[2]:.3f}")
    save_features(arguments.output_dir, network, list(EMOJI), list(BACKGROUNDS))


def losses(network: EmojiFeatures, scenes: EmojiScenes, count: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Cross-entropies of emoji and background, and the share of emoji that are right; pictures with slight noise."""
    scene = scenes.pictures(count)
    pixels = (scene.pixels[:, :, 0] / 2 + 0.5) + 0.03 * torch.rand(count, 1, 1, 1) * torch.randn(count, 3, 64, 64)
    _, _, emoji, background = network(pixels)
    right = (emoji.argmax(1) == scene.emoji).float().mean().item()
    return F.cross_entropy(emoji, scene.emoji), F.cross_entropy(background, scene.background), right


if __name__ == "__main__":
    main()

"""The feature network of the embedded data: what Frechet distance, diversity and prompt agreement are measured in.

A small convolutional classifier of emoji and background, trained on the same scenes as the teacher. Distances in its
features are called FD-Emoji.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parent / "models" / "features"
FEATURES = 96


class EmojiFeatures(nn.Module):
    """Pixels in [0, 1] of shape (batch, 3, 64, 64) to features (batch, 96) and two sets of logits."""

    def __init__(self, emoji: int, backgrounds: int) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, stride=2, padding=1), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, FEATURES))
        self.emoji = nn.Linear(FEATURES, emoji)
        self.background = nn.Linear(FEATURES, backgrounds)

    def features(self, pixels: Tensor) -> Tensor:
        """(batch, 96). The map keeps places: two pictures of one emoji in different corners differ."""
        return self.body(pixels * 2 - 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.features(pixels)
        hidden = F.silu(features)
        return features, self.emoji(hidden), self.background(hidden)


def save_features(folder: Path, network: EmojiFeatures, emoji: list[str], backgrounds: list[str]) -> None:
    """Write the network with its class names."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    save_file(half, folder / "model.safetensors", {"emoji": json.dumps(emoji), "backgrounds": json.dumps(backgrounds)})


def load_features(folder: Path = FOLDER) -> tuple[EmojiFeatures, list[str], list[str]]:
    """The network, the emoji names and the background names."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = {key: json.loads(value) for key, value in file.metadata().items() if key in ("emoji", "backgrounds")}
    network = EmojiFeatures(len(names["emoji"]), len(names["backgrounds"]))
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return network.float().eval().requires_grad_(False), names["emoji"], names["backgrounds"]


@torch.no_grad()
def features_of(network: EmojiFeatures, pixels: Tensor, batch: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Features and predicted classes of samples (count, frames, 3, 64, 64); features are averaged over the frames,
    classes are those of the middle frame."""
    features, emoji, background = [], [], []
    for part in pixels.split(batch):
        found, e, b = network(part.flatten(0, 1))
        shape = part.shape[:2]
        features.append(found.view(*shape, -1).mean(1))
        middle = shape[1] // 2
        emoji.append(e.view(*shape, -1)[:, middle].argmax(-1))
        background.append(b.view(*shape, -1)[:, middle].argmax(-1))
    return torch.cat(features), torch.cat(emoji), torch.cat(background)

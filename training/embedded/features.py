"""The feature network of the embedded data: what Frechet distance, diversity and prompt agreement are measured in.

A small convolutional classifier of emoji and background, trained on the same scenes as the teacher. It gives three
things: ``style``, mean and standard deviation over the picture of 64 channels of its second stage, which see edges and
texture and are blind to place (the Frechet distance in them is called FD-Emoji); ``layout``, its last features, which
see what is where (diversity over seeds is measured in them); and the classes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parent / "models" / "features"
LAYOUT = 96
STYLE = 128
_STAGE = 5
"""Layers of one stage: convolution, normalisation, activation, strided convolution, activation."""


class EmojiFeatures(nn.Module):
    """Pixels in [0, 1] of shape (batch, 3, 64, 64) to style, layout, emoji logits and background logits."""

    def __init__(self, emoji: int, backgrounds: int) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, stride=2, padding=1), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, LAYOUT))
        self.emoji = nn.Linear(LAYOUT, emoji)
        self.background = nn.Linear(LAYOUT, backgrounds)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Style (batch, 128), layout (batch, 96), logits of the emoji and of the background."""
        stages = self.body[: 2 * _STAGE](pixels * 2 - 1)
        style = torch.cat([stages.mean((2, 3)), stages.std((2, 3))], dim=1)
        layout = self.body[2 * _STAGE :](stages)
        hidden = F.silu(layout)
        return style, layout, self.emoji(hidden), self.background(hidden)


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


@dataclass(frozen=True)
class Seen:
    """What the network sees in samples; clips are averaged over frames, their classes are those of the middle frame."""

    style: Tensor
    layout: Tensor
    emoji: Tensor
    background: Tensor


@torch.no_grad()
def see(network: EmojiFeatures, pixels: Tensor, batch: int = 128) -> Seen:
    """Run the network over samples (count, frames, 3, 64, 64) in [0, 1]."""
    parts = []
    for part in pixels.split(batch):
        style, layout, emoji, background = (
            output.unflatten(0, part.shape[:2]) for output in network(part.flatten(0, 1))
        )
        middle = part.shape[1] // 2
        parts.append((style.mean(1), layout.mean(1), emoji[:, middle].argmax(-1), background[:, middle].argmax(-1)))
    return Seen(*(torch.cat(values) for values in zip(*parts, strict=True)))

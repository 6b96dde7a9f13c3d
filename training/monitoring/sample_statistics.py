"""What can be seen in samples of fixed prompts and seeds without any network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pdmd_core.metrics.diversity import seed_pairs

_FRAMES, _SIDE = 4, 16
"""Frames of a clip that are looked at, and the pixels a side to which pictures are reduced to compare their layout."""


@dataclass(frozen=True)
class SampleStatistics:
    """Means over samples in [0, 1]."""

    diversity: float | None
    """Root mean square difference of samples of one prompt, as thumbnails; None for one seed."""
    saturation: float
    """Largest minus smallest of red, green and blue."""
    contrast: float
    """Standard deviation of brightness within a picture."""
    clipped: float
    """Share of values at black or white."""


@torch.no_grad()
def sample_statistics(pixels: Tensor, seeds: int) -> SampleStatistics:
    """pixels: (prompts * seeds, frames, 3, height, width) in [0, 1], the seeds of a prompt side by side."""
    chosen = torch.linspace(0, pixels.shape[1] - 1, min(_FRAMES, pixels.shape[1])).round().long()
    frames = pixels[:, chosen].float()
    pictures = frames.flatten(0, 1)
    thumbnails = functional.adaptive_avg_pool2d(pictures, _SIDE).unflatten(0, frames.shape[:2]).flatten(1)
    first, second = seed_pairs(torch.arange(len(pixels)) // seeds)
    differences = (thumbnails[first] - thumbnails[second]).square().mean(1).sqrt()
    return SampleStatistics(
        diversity=float(differences.mean()) if len(differences) else None,
        saturation=float((pictures.amax(1) - pictures.amin(1)).mean()),
        contrast=float(pictures.mean(1).flatten(1).std(1).mean()),
        clipped=float(((pictures < 1 / 255) | (pictures > 254 / 255)).float().mean()),
    )

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
    motion: float | None = None
    """Root mean square difference of neighbouring frames, as thumbnails; None of pictures."""
    teacher_distance: float | None = None
    """Root mean square difference to the teacher's sample of the same prompt and noise, as thumbnails, where that of
    two samples of the teacher's with different prompts and noise is 1; None without a teacher to compare with."""


@torch.no_grad()
def sample_statistics(pixels: Tensor, seeds: int, teacher: Tensor | None = None) -> SampleStatistics:
    """Look at samples.

    Args:
        pixels: Samples of shape (prompts * seeds, frames, 3, height, width) in [0, 1], the seeds of a prompt side by
            side.
        seeds: Samples of a prompt.
        teacher: ``thumbnails`` of the teacher's of the same prompts and noise.

    Returns:
        Means over the samples.
    """
    frames = _some_frames(pixels)
    pictures, small = frames.flatten(0, 1), thumbnails(pixels)
    first, second = seed_pairs(torch.arange(len(pixels)) // seeds)
    differences = _distances(small[first], small[second])
    distance = None
    if teacher is not None:
        apart = torch.arange(len(teacher)).view(-1, seeds).roll((1, 1), (0, 1)).flatten()
        spread = float(_distances(teacher, teacher[apart]).mean())
        distance = float(_distances(small, teacher).mean()) / spread if spread else None
    return SampleStatistics(
        diversity=float(differences.mean()) if len(differences) else None,
        saturation=float((pictures.amax(1) - pictures.amin(1)).mean()),
        contrast=float(pictures.mean(1).flatten(1).std(1).mean()),
        clipped=float(((pictures < 1 / 255) | (pictures > 254 / 255)).float().mean()),
        motion=_motion(pixels),
        teacher_distance=distance,
    )


def _some_frames(pixels: Tensor) -> Tensor:
    chosen = torch.linspace(0, pixels.shape[1] - 1, min(_FRAMES, pixels.shape[1])).round().long()
    return pixels[:, chosen].float()


def thumbnails(pixels: Tensor) -> Tensor:
    """Make small versions of some frames.

    Args:
        pixels: Samples of shape (count, frames, 3, height, width).

    Returns:
        Of shape (count, values).
    """
    frames = _some_frames(pixels)
    return functional.adaptive_avg_pool2d(frames.flatten(0, 1), _SIDE).unflatten(0, frames.shape[:2]).flatten(1)


def _distances(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).square().mean(1).sqrt()


def _motion(pixels: Tensor) -> float | None:
    if pixels.shape[1] < 2:
        return None
    small = functional.adaptive_avg_pool2d(pixels.float().flatten(0, 1), _SIDE).unflatten(0, pixels.shape[:2])
    return float((small[:, 1:] - small[:, :-1]).flatten(2).square().mean(2).sqrt().mean())

"""Distance to the teacher and diversity of samples in the features of a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pdmd_core.metrics import frechet_distance, pairwise_distance
from training.evaluation.identity import FileHashes
from training.evaluation.measures import Pixels, load_space


@dataclass(frozen=True)
class FeatureStatistics:
    """Of a set of samples."""

    frechet: float
    """Frechet distance to the teacher's samples of the same prompts and noise: biased, as samples are few, and so
    compared with itself at other updates only."""
    feature_diversity: float | None
    """Mean distance of samples of one prompt; None for one seed."""


class FeatureComparison:
    """Compares sets of samples with one of the teacher's.

    Args:
        name: The network: emoji, or efflite0.
        memory: Where hashes of its files are remembered.
        device: Where it runs.

    Raises:
        UserError: When its weights are not there.
    """

    def __init__(self, name: str, memory: Path, device: torch.device) -> None:
        self.space = load_space(name, None, FileHashes(memory), device)
        self.teacher: dict[str, dict[str, Tensor]] = {}
        """By phase: features of the teacher's samples."""

    def rows(self, pixels: Tensor) -> dict[str, Tensor]:
        """Features of samples (count, frames, 3, height, width) in [0, 1], one row for each."""
        rows = self.space(Pixels(pixels))
        return {"features": rows["features"], "layout": rows.get("layout", rows["features"])}

    def compare(self, pixels: Tensor, phase: str, seeds: int) -> FeatureStatistics:
        """Compare samples with the teacher's as they look from a phase's end; the seeds of a prompt side by side."""
        own, teacher = self.rows(pixels), self.teacher[phase]
        return FeatureStatistics(frechet_distance(own["features"], teacher["features"]), _diversity(own, seeds))

    def of_teacher(self, phase: str, seeds: int) -> FeatureStatistics:
        """What the teacher's own samples have."""
        return FeatureStatistics(0.0, _diversity(self.teacher[phase], seeds))


def _diversity(rows: dict[str, Tensor], seeds: int) -> float | None:
    layout = rows["layout"]
    return pairwise_distance(layout, torch.arange(len(layout)) // seeds) if seeds > 1 else None

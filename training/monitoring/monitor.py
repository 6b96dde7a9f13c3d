"""What the monitors of a run are told. They may write files and can never stop it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

from torch import Tensor
from tqdm.auto import tqdm

from training.monitoring.feature_statistics import FeatureStatistics
from training.monitoring.sample_statistics import SampleStatistics


@dataclass(frozen=True)
class UpdateReport:
    """One update as monitors of a run see it."""

    update: int
    """Updates done so far, in all phases."""
    expert: str
    values: dict[str, float]
    """By name: losses and gradient norms over all processes, phase, lr_factor, bad_updates."""
    sigmas: dict[str, list[float]] = field(default_factory=dict)
    """Noise levels of this process's samples, by what was trained there: fake, generator."""


@dataclass(frozen=True)
class Validation:
    """Samples of the fixed prompts and seeds, and what was seen in them."""

    name: str
    update: int
    """Updates done so far, in all phases."""
    expert: str
    """The expert in training."""
    pixels: Tensor
    """(prompts * seeds, frames, 3, height, width) in [0, 1]."""
    statistics: SampleStatistics
    features: FeatureStatistics | None = None
    """Where they were measured at this update."""

    @property
    def measures(self) -> dict[str, float | None]:
        """All numbers by name."""
        return asdict(self.statistics) | (asdict(self.features) if self.features else {})


class Monitor(Protocol):
    """A monitor of a run. The trainer calls its methods in this order."""

    def start(self, update: int) -> None:
        """The run goes on after this update, on every process."""

    def start_phase(self, expert: str, parameters: Sequence[Tensor]) -> None:
        """An expert begins to train, or goes on to, with these weights, on every process."""

    def after_update(self, report: UpdateReport) -> None:
        """An update is done, on every process."""

    def teacher(
        self, phase: str, pixels: Tensor, statistics: SampleStatistics, features: FeatureStatistics | None
    ) -> None:
        """The teacher's samples of the fixed prompts and seeds as they look from the end of a phase, main process."""

    def validation(self, shown: Validation) -> None:
        """A validation was sampled, on the main process."""

    def finish(self) -> None:
        """All phases are trained and the experts are written, or a signal ended the run, on every process."""


def warn(text: str) -> None:
    """Say one line on standard error, above a progress bar."""
    tqdm.write(f"distill.py: warning: {text}", file=sys.stderr)

"""What the monitors of a run are told. They may write files and can never stop it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor
from tqdm.auto import tqdm


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


class Monitor(Protocol):
    """A monitor of a run. The trainer calls its methods in this order."""

    def start(self, update: int) -> None:
        """The run goes on after this update, on every process."""

    def start_phase(self, expert: str, parameters: Sequence[Tensor]) -> None:
        """An expert begins to train, or goes on to, with these weights, on every process."""

    def after_update(self, report: UpdateReport) -> None:
        """An update is done, on every process."""

    def validation(self, name: str, pixels: Tensor, update: int) -> None:
        """Samples (prompts * seeds, frames, 3, height, width) in [0, 1] of the fixed ones, on the main process."""

    def finish(self) -> None:
        """All phases are trained and the experts are written, or a signal ended the run, on every process."""


def warn(text: str) -> None:
    """Say one line on standard error, above a progress bar."""
    tqdm.write(f"distill.py: warning: {text}", file=sys.stderr)

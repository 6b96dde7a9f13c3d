"""Who watches a run is told what happens, may write files, and can never stop it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from training.config.schema import DistillConfig


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
    """What the trainer tells; in this order."""

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


class FailSafe:
    """A monitor whose failures are warnings, each said once: no run ends because of a plot or a full disk."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self._said: set[str] = set()

    def start(self, update: int) -> None:
        self._try(lambda: self.monitor.start(update))

    def start_phase(self, expert: str, parameters: Sequence[Tensor]) -> None:
        self._try(lambda: self.monitor.start_phase(expert, parameters))

    def after_update(self, report: UpdateReport) -> None:
        self._try(lambda: self.monitor.after_update(report))

    def validation(self, name: str, pixels: Tensor, update: int) -> None:
        self._try(lambda: self.monitor.validation(name, pixels, update))

    def finish(self) -> None:
        self._try(self.monitor.finish)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            text = f"{type(self.monitor).__name__} failed, the run goes on: {type(error).__name__}: {error}"
            if text not in self._said:
                self._said.add(text)
                warn(" ".join(text.split()))


def warn(text: str) -> None:
    """One line on standard error, above a progress bar."""
    tqdm.write(f"distill.py: warning: {text}", file=sys.stderr)


def monitors_of(config: DistillConfig, accelerator: Accelerator) -> list[FailSafe]:
    """Everybody who watches a run of this configuration."""
    from training.monitoring.metrics_log import Metrics
    from training.monitoring.observer import Observer

    found: list[Monitor] = [Metrics(config, accelerator)]
    if accelerator.is_main_process:
        found.append(Observer(config, accelerator))
    return [FailSafe(monitor) for monitor in found]

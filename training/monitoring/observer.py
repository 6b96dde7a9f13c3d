"""The main process looks at its run: speed, alerts of trouble, samples, TensorBoard, the page."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional

from training.config.schema import DistillConfig
from training.evaluation.pictures import grid
from training.monitoring.alerts import Alert, Alerts
from training.monitoring.jsonl import monitoring_log
from training.monitoring.monitor import UpdateReport, warn
from training.monitoring.page import write_page
from training.monitoring.sample_statistics import SampleStatistics, sample_statistics
from training.monitoring.speed import Speed, as_values
from training.monitoring.tensorboard import Board
from training.monitoring.weight_drift import WeightDrift

SIDE, FRAMES = 160, 16
"""The longer side of a sample in small pictures, and the frames of a small clip."""


class Observer:
    """Writes into ``watch/`` and ``report.html`` of a run."""

    def __init__(
        self, config: DistillConfig, accelerator: Accelerator, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.config, self.accelerator, self.run, self.clock = config, accelerator, config.output_dir, clock
        self.performance, self.validations, self.warnings = (
            monitoring_log(self.run, name) for name in ("performance", "validations", "warnings")
        )
        self.alerts = Alerts(config.monitoring)
        self.speed = Speed(config, accelerator.device, clock)
        self.seconds = 0.0
        """Spent in here."""
        self._began = clock()
        self._drift: WeightDrift | None = None
        self._sigmas: dict[str, list[float]] = {}
        self._in_phase = 0
        self._share = config.updates_of(0)
        self._expert = ""

    # --- what the trainer tells ------------------------------------------------------------

    def start(self, update: int) -> None:
        """The run goes on after this update: what was seen before is known."""
        for lines in (self.performance, self.validations, self.warnings):
            lines.start(update)
        self.alerts = Alerts(self.config.monitoring, {(line["kind"], line["expert"]) for line in self.warnings.read()})
        for line in self.validations.read():
            self.alerts.validation(
                line["update"],
                line["expert"],
                SampleStatistics(**{k: line[k] for k in SampleStatistics.__annotations__}),
            )
        if board := self._board():
            board.configuration(self.config)

    def start_phase(self, expert: str, parameters: Sequence[Tensor]) -> None:
        """An expert begins to train, or goes on to."""
        names = [phase.name for phase in self.config.plan.build().phases]
        self._expert, self._share, self._in_phase = expert, self.config.updates_of(names.index(expert)), 0
        self._drift = WeightDrift(parameters)
        self.speed.restart()

    def after_update(self, report: UpdateReport) -> None:
        """An update is done."""
        performance = self.speed.after_update(report.update)
        with self._counted():
            self._in_phase += 1
            for name, sigmas in report.sigmas.items():
                self._sigmas.setdefault(name, []).extend(sigmas)
            found = self.alerts.after_update(report.update, report.expert, report.values)
            if self._drift is not None and self._in_phase % self.config.monitoring.window == 0:
                share = self._in_phase / self._share
                found += self.alerts.weight_drift(report.update, report.expert, *self._drift.measure(), share)
            self._report(found)
            if report.update % self.config.monitoring.log_every == 0:
                values = as_values(performance) | {"watching_share": round(self._own_share(), 4)}
                self.performance.add({"update": report.update, **values})
                if self.config.monitoring.tracker:
                    self.accelerator.log({f"performance/{k}": v for k, v in values.items()}, step=report.update)
                if board := self._board():
                    board.histograms(self._sigmas, report.update)
                self._sigmas = {}

    @torch.no_grad()
    def validation(self, name: str, pixels: Tensor, update: int) -> None:
        """Samples of the fixed prompts and seeds."""
        with self._counted():
            statistics = sample_statistics(pixels, self.config.validation.seeds)
            line = {"update": update, "expert": self._expert, "name": name, **asdict(statistics)}
            if line not in self.validations.read():  # a run that was stopped here makes the same samples again
                self.validations.add(line)
                self._report(self.alerts.validation(update, self._expert, statistics))
            pictures = save_small(self.run / "watch" / "samples" / name, pixels, self.config.validation.seeds)
            if board := self._board():
                for picture in pictures:
                    board.picture("clips" if picture.suffix == ".gif" else "samples", picture, update)
            if self.config.monitoring.page and self._own_share() <= self.config.monitoring.share_of_time:
                write_page(self.run)
        self.speed.restart()

    def finish(self) -> None:
        """All phases are trained."""
        if self.config.monitoring.page:
            write_page(self.run)

    # --- how it does it ------------------------------------------------------------

    def _report(self, alerts: Sequence[Alert]) -> None:
        for alert in alerts:
            self.warnings.add(asdict(alert))
            warn(f"update {alert.update}, {alert.expert}: {alert.text}")

    def _board(self) -> Board | None:
        if self.config.monitoring.tracker != "tensorboard" or not self.accelerator.trackers:
            return None
        return Board(self.accelerator.get_tracker("tensorboard", unwrap=True))

    @contextmanager
    def _counted(self) -> Iterator[None]:
        start = self.clock()
        try:
            yield
        finally:
            self.seconds += self.clock() - start

    def _own_share(self) -> float:
        """Of the time of the run."""
        return self.seconds / max(self.clock() - self._began, 1e-9)


def save_small(path: Path, pixels: Tensor, columns: int) -> list[Path]:
    """A small WebP of samples (count, frames, 3, height, width), of clips their middle frames, and a small GIF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, frames, _, height, width = pixels.shape
    chosen = pixels[:, torch.linspace(0, frames - 1, min(frames, FRAMES)).round().long()].float()
    scale = min(1.0, SIDE / max(height, width))
    if scale < 1:
        size = round(height * scale), round(width * scale)
        small = functional.interpolate(chosen.flatten(0, 1), size, mode="bilinear", antialias=True)
        chosen = small.unflatten(0, (count, -1))
    sheets = [grid(chosen[:, i], columns) for i in range(chosen.shape[1])]
    written = [path.with_suffix(".webp")]
    sheets[len(sheets) // 2].save(written[0], quality=85)
    if len(sheets) > 1:
        written.append(path.with_suffix(".gif"))
        sheets[0].save(written[1], save_all=True, append_images=sheets[1:], duration=120, loop=0)
    return written

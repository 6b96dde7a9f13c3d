"""The main process looks at its run: speed, alerts of trouble, samples, TensorBoard, the page."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from training.config.schema import DistillConfig
from training.evaluation.pictures import grid
from training.monitoring.alerts import BROKEN, Alert, Alerts
from training.monitoring.feature_statistics import FeatureStatistics
from training.monitoring.jsonl import JsonLines, monitoring_log
from training.monitoring.monitor import UpdateReport, Validation, warn
from training.monitoring.page import teacher_picture, write_page
from training.monitoring.sample_statistics import SampleStatistics
from training.monitoring.speed import Speed, as_values
from training.monitoring.trackers import Tracking
from training.monitoring.weight_drift import WeightDrift

Statistics = TypeVar("Statistics", SampleStatistics, FeatureStatistics)
SIDE, FRAMES = 160, 16
"""The longer side of a sample in small pictures, and the frames of a small clip."""


class Observer:
    """Writes into ``watch/`` and ``report.html`` of a run."""

    def __init__(
        self,
        config: DistillConfig,
        device: torch.device,
        tracking: Tracking,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config, self.tracking, self.run, self.clock = config, tracking, config.output_dir, clock
        self.performance, self.validations, self.warnings = (
            monitoring_log(self.run, name) for name in ("performance", "validations", "warnings")
        )
        self.experts = [phase.name for phase in config.plan.build().phases]
        self.alerts = Alerts(config.monitoring, self.experts[-1])
        self.speed = Speed(config, device, clock)
        self.seconds = 0.0
        """Spent in here."""
        self.reason_to_stop: str | None = None
        self._began = clock()
        self._drift: WeightDrift | None = None
        self._sigmas: dict[str, list[float]] = {}
        self._in_phase = 0
        self._share = config.updates_of(0)
        self._teacher: dict[str, dict[str, float | None]] = {}

    # --- what the trainer tells ------------------------------------------------------------

    def start(self, update: int) -> None:
        """The run goes on after this update: what was seen before is known."""
        for lines in (self.performance, self.validations, self.warnings):
            lines.start(update)
        seen = {(line["kind"], line["expert"]) for line in self.warnings.read()}
        self.alerts = Alerts(self.config.monitoring, self.experts[-1], seen)
        for line in JsonLines(self.run / "metrics.jsonl").read():
            self.alerts.replay(line["expert"], line)
        for line in self.validations.read():
            features = _read(FeatureStatistics, line) if "frechet" in line else None
            self.alerts.validation(line["update"], line["expert"], _read(SampleStatistics, line), features)

    def start_phase(self, expert: str, parameters: Sequence[Tensor]) -> None:
        """An expert begins to train, or goes on to."""
        self._share, self._in_phase = self.config.updates_of(self.experts.index(expert)), 0
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
                self.tracking.numbers({f"performance/{k}": v for k, v in values.items()}, report.update)
                if board := self.tracking.board:
                    board.histograms(self._sigmas, report.update)
                self._sigmas = {}

    @torch.no_grad()
    def teacher(
        self, phase: str, pixels: Tensor, statistics: SampleStatistics, features: FeatureStatistics | None
    ) -> None:
        """The teacher's samples of the fixed prompts and seeds as they look from the end of a phase."""
        with self._counted():
            self.alerts.teacher(phase, statistics, features)
            self._teacher[phase] = asdict(statistics) | (asdict(features) if features else {})
            save_small(teacher_picture(self.run, phase), pixels, self.config.validation.seeds)
            path = self.run / "watch" / "teacher.json"
            path.write_text(json.dumps(self._teacher, indent=1) + "\n", encoding="utf-8")

    @torch.no_grad()
    def validation(self, shown: Validation) -> None:
        """Samples of the fixed prompts and seeds."""
        update, expert = shown.update, shown.expert
        with self._counted():
            line = {"update": update, "expert": expert, "name": shown.name, **shown.measures}
            if line not in self.validations.read():  # a run that was stopped here makes the same samples again
                self.validations.add(line)
                self._report(self.alerts.validation(update, expert, shown.statistics, shown.features))
            pictures = save_small(
                self.run / "watch" / "samples" / shown.name, shown.pixels, self.config.validation.seeds
            )
            for picture in pictures:
                self.tracking.picture("clips" if picture.suffix == ".gif" else "samples", picture, update)
                beside = teacher_picture(self.run, expert).with_suffix(picture.suffix)
                if expert in self._teacher and beside.exists():
                    self.tracking.picture("teacher_clips" if beside.suffix == ".gif" else "teacher", beside, update)
            self.tracking.numbers({f"samples/{k}": v for k, v in shown.measures.items()}, update)
            self.tracking.numbers({f"teacher/{k}": v for k, v in self._teacher.get(expert, {}).items()}, update)
            in_time = not update or self._own_share() <= self.config.monitoring.share_of_time
            if self.config.monitoring.page and in_time:
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
            if alert.kind == BROKEN and self.config.monitoring.stop_when_broken:
                self.reason_to_stop = f"stopped at update {alert.update}, {alert.expert}: {alert.text}"

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


def _read(kind: type[Statistics], line: Mapping[str, Any]) -> Statistics:
    """Statistics of a line of the log; what an earlier version did not measure is its default."""
    return kind(**{field.name: line[field.name] for field in fields(kind) if field.name in line})


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

"""The numbers of a run: lines of metrics.jsonl, and points of a tracker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from training.config.schema import DistillConfig
from training.monitoring.feature_statistics import FeatureStatistics
from training.monitoring.jsonl import JsonLines
from training.monitoring.monitor import UpdateReport, Validation
from training.monitoring.sample_statistics import SampleStatistics
from training.monitoring.trackers import Tracking


class Metrics:
    """Written every ``log_every`` updates, and after the first, with the time of day in seconds since 1970."""

    def __init__(self, config: DistillConfig, tracking: Tracking, clock: Callable[[], float] = time.time) -> None:
        self.lines, self.tracking, self.clock = JsonLines(config.output_dir / "metrics.jsonl"), tracking, clock
        self.log_every = config.monitoring.log_every

    def start(self, update: int) -> None:
        """The run goes on after this update: drop lines of updates that are about to be done again."""
        self.lines.start(update)
        self.tracking.start(update)

    def start_phase(self, expert: str, parameters: Sequence[Tensor]) -> None:
        """The reports of updates name the expert."""

    def after_update(self, report: UpdateReport) -> None:
        """An update is done."""
        if report.update % self.log_every and report.update != 1:
            return
        now = round(self.clock(), 3)
        self.lines.add({"update": report.update, "expert": report.expert, **report.values, "time": now})
        self.tracking.numbers(report.values, report.update)

    def teacher(
        self, phase: str, pixels: Tensor, statistics: SampleStatistics, features: FeatureStatistics | None
    ) -> None:
        """Samples are the observer's."""

    def validation(self, shown: Validation) -> None:
        """Samples are the observer's."""

    def finish(self) -> None:
        """All phases are trained."""
        self.tracking.finish()

"""The numbers of a run: lines of metrics.jsonl, and points of a tracker that accelerate knows."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator
from torch import Tensor

from training.config.schema import DistillConfig
from training.monitoring.jsonl import JsonLines
from training.monitoring.monitor import UpdateReport


class Metrics:
    """Written every ``log_every`` updates, and after the first."""

    def __init__(self, config: DistillConfig, accelerator: Accelerator) -> None:
        self.lines, self.accelerator = JsonLines(config.output_dir / "metrics.jsonl"), accelerator
        self.log_every, self.tracker = config.monitoring.log_every, bool(config.monitoring.tracker)

    def start(self, update: int) -> None:
        """The run goes on after this update: drop lines of updates that are about to be done again."""
        if self.accelerator.is_main_process:
            self.lines.start(update)
        if self.tracker:
            self.accelerator.init_trackers("phased_dmd")

    def start_phase(self, expert: str, parameters: Sequence[Tensor]) -> None:
        """The reports of updates name the expert."""

    def after_update(self, report: UpdateReport) -> None:
        """An update is done, on every process."""
        if report.update % self.log_every and report.update != 1:
            return
        if self.accelerator.is_main_process:
            self.lines.add({"update": report.update, "expert": report.expert, **report.values})
        if self.tracker:
            self.accelerator.log(report.values, step=report.update)

    def validation(self, name: str, pixels: Tensor, update: int) -> None:
        """Samples are the observer's."""

    def finish(self) -> None:
        """All phases are trained."""
        if self.tracker:
            self.accelerator.end_training()

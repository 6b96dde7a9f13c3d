"""The numbers of a run: lines of metrics.jsonl, and points of a tracker that accelerate knows."""

from __future__ import annotations

import json
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from training.progress import UpdateReport


class Metrics:
    """Written every ``log_every`` updates, and after the first."""

    def __init__(self, path: Path, accelerator: Accelerator, log_every: int, tracker: bool) -> None:
        self.path, self.accelerator, self.log_every, self.tracker = path, accelerator, log_every, tracker

    def start(self, update: int) -> None:
        """The run goes on after this update: drop lines of updates that are about to be done again."""
        if self.accelerator.is_main_process and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["update"] <= update]
            self.path.write_text("".join(kept), encoding="utf-8")
        if self.tracker:
            self.accelerator.init_trackers("phased_dmd")

    def after_update(self, report: UpdateReport) -> None:
        """An update is done, on every process."""
        if report.update % self.log_every and report.update != 1:
            return
        if self.accelerator.is_main_process:
            line = json.dumps({"update": report.update, "expert": report.expert, **report.values})
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        if self.tracker:
            self.accelerator.log(report.values, step=report.update)

    def validation(self, name: str, pixels: Tensor, update: int) -> None:
        """Samples (count, frames, 3, height, width) in [0, 1] of the fixed prompts and seeds: nothing to count."""

    def finish(self) -> None:
        """All phases are trained."""
        if self.tracker:
            self.accelerator.end_training()

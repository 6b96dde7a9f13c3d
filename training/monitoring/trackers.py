"""A tracker that accelerate knows, with all that a run has to show: numbers, pictures and clips, the configuration.

Its files go into ``logs/`` of the output folder, and a run that goes on is the same run there.
"""

from __future__ import annotations

import importlib
import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from PIL import Image

from training.config.command_line import UserError
from training.config.problems import leaves_of
from training.config.schema import DistillConfig
from training.monitoring.tensorboard import Board

PROJECT = "phased_dmd"
_PACKAGES = {"comet_ml": "comet-ml"}
"""What pip calls a package that is not called as its tracker."""


def check_tracker(config: DistillConfig) -> None:
    """Refuse a tracker whose package is not installed: before anything is loaded.

    Args:
        config: The configuration of the run.

    Raises:
        UserError: What to install.
    """
    name = config.monitoring.tracker
    if name and name not in [str(found) for found in get_available_trackers()]:
        raise UserError(
            f"monitoring.tracker: {name} takes a package that is not installed here: "
            f"pip install {_PACKAGES.get(name, name)}, or set monitoring.tracker=null"
        )


class Tracking:
    """The tracker of a run, on the main process; without one nothing is written.

    Args:
        config: The configuration of the run.
        accelerator: What knows the tracker.
    """

    def __init__(self, config: DistillConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.name, self.folder = config.monitoring.tracker, config.output_dir / "logs"

    def start(self, update: int) -> None:
        """Open the run that goes on after this update: the tracker's own of before, or a new one after none."""
        if not (self.name and self.accelerator.is_main_process):
            return
        settings = _SETTINGS[self.name](self._run_id(update), self.folder) if self.name in _SETTINGS else {}
        values = self.config.model_dump(mode="json")
        if self.name == "wandb":
            settings |= {"name": self.config.output_dir.name, "config": values}
        self.accelerator.init_trackers(PROJECT, init_kwargs={self.name: settings})
        if board := self.board:
            board.configuration(self.config)
        elif self.name == "wandb":  # steps of its own only rise, and a run may go back
            self.accelerator.get_tracker("wandb", unwrap=True).define_metric("*", step_metric="update")
        else:
            plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in leaves_of(values).items()}
            self.accelerator.trackers[0].store_init_configuration(plain)

    @property
    def board(self) -> Board | None:
        """TensorBoard, where it is the tracker and was started."""
        if self.name != "tensorboard" or not self.accelerator.trackers:
            return None
        return Board(self.accelerator.get_tracker("tensorboard", unwrap=True))

    def numbers(self, values: Mapping[str, float | None], update: int) -> None:
        """Log numbers by name; those that are None are left out."""
        if self.accelerator.trackers:
            self._log({name: value for name, value in values.items() if value is not None}, update)

    def picture(self, tag: str, path: Path, update: int) -> None:
        """Show a picture, or a clip as it moves where the tracker can."""
        if not self.accelerator.trackers:
            return
        tracker = self.accelerator.trackers[0]
        if board := self.board:
            board.picture(tag, path, update)
        elif self.name == "wandb":
            wandb = importlib.import_module("wandb")
            clip = path.suffix == ".gif"
            self._log({tag: wandb.Video(str(path), format="gif") if clip else wandb.Image(str(path))}, update)
        elif hasattr(tracker, "log_images"):
            with Image.open(path) as image:
                tracker.log_images({tag: [image.convert("RGB")]}, step=update)

    def finish(self) -> None:
        """The run ends."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _log(self, values: Mapping[str, Any], update: int) -> None:
        if self.name == "wandb":
            self.accelerator.log({**values, "update": update})
        else:
            self.accelerator.log(dict(values), step=update)

    def _run_id(self, update: int) -> str:
        """The id under which the tracker knows this run; a new one for a run that begins."""
        path = self.folder / "tracker.json"
        if update and path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found, dict) and isinstance(found.get(self.name), str):
                return str(found[self.name])
        path.parent.mkdir(parents=True, exist_ok=True)
        new = secrets.token_hex(4)
        path.write_text(json.dumps({self.name: new}) + "\n", encoding="utf-8")
        return new


_SETTINGS: dict[str, Callable[[str, Path], dict[str, Any]]] = {
    "wandb": lambda run, folder: {"id": run, "resume": "allow", "dir": str(folder)},
    "trackio": lambda run, folder: {"name": run, "resume": "allow"},
    "swanlab": lambda run, folder: {"id": run, "resume": "allow", "logdir": str(folder / "swanlab")},
    "dvclive": lambda run, folder: {"dir": str(folder / "dvclive"), "resume": True},
    "mlflow": lambda run, folder: {"logging_dir": str(folder / "mlruns")},
}
"""What a tracker is started with, given the run's id and the folder of its files."""

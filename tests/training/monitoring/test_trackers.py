"""Trackers: what they are given, where their files are, and which run they go on."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
from accelerate import Accelerator
from accelerate.utils import LoggerType

from tests.helpers.configs import changed
from training.config.command_line import UserError
from training.config.schema import DistillConfig
from training.config.sections import Tracker
from training.loop.build import build_run
from training.loop.dry_run import describe
from training.loop.resumption import Resume
from training.loop.trainer import Trainer
from training.monitoring import trackers


class Run:
    """What wandb.init returns."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.logged, self.metrics, self.finished = settings, [], [], False

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        assert step is None, "wandb drops what is logged at an earlier step than before"
        self.logged.append(values)

    def define_metric(self, *names: str, **settings: Any) -> None:
        self.metrics.append((names, settings))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that wandb was asked for; a package of its name stands in for it, as it is not installed."""
    found: list[Run] = []
    package = types.ModuleType("wandb")

    def init(**settings: Any) -> Run:
        found.append(Run(**settings))
        return found[-1]

    package.init, package.Image, package.Video = init, lambda path: ("image", path), lambda path, format: (format, path)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", package)
    available = [LoggerType.TENSORBOARD, LoggerType.WANDB]
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: available)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: available)
    return found


def test_trackers_are_those_that_accelerate_knows() -> None:
    assert set(get_args(Tracker)) == {str(name) for name in LoggerType} - {"all"}


def test_a_package_that_is_missing_is_one_line_before_anything_is_loaded(config: DistillConfig) -> None:
    asked = changed(config, **{"monitoring.tracker": "wandb"})
    for run in (build_run, describe):
        with (
            mock.patch.object(trackers, "get_available_trackers", lambda: [LoggerType.TENSORBOARD]),
            mock.patch("training.loop.build.load_image_side", side_effect=AssertionError("loaded")),
            pytest.raises(UserError, match=r"^monitoring\.tracker: wandb takes .*: pip install wandb, or set"),
        ):
            run(asked)


def test_wandb_has_numbers_and_samples_and_one_run_over_resumptions(config: DistillConfig, runs: list[Run]) -> None:
    asked = changed(config, updates=1, **{"monitoring.tracker": "wandb", "validation.every": 1, "model.frames": 5})
    Trainer(build_run(asked)).run()
    Trainer(build_run(changed(asked, updates=[1, 2]), Resume(["updates"]))).run()
    first, second = runs
    assert first.settings["id"] == second.settings["id"] and second.settings["resume"] == "allow"
    assert Path(first.settings["dir"]) == config.output_dir / "logs"
    assert first.settings["config"]["generator"]["rank"] == 4 and first.metrics == [(("*",), {"step_metric": "update"})]
    names = {name for values in first.logged for name in values}
    assert {
        "generator_loss",
        "performance/seconds_per_update",
        "samples/teacher_distance",
        "teacher/saturation",
    } <= names
    kinds = {
        name: values[name][0] for values in first.logged for name in values if name == "samples" or "clips" in name
    }
    assert kinds == {"samples": "image", "clips": "gif", "teacher_clips": "gif"}
    assert [values["update"] for values in second.logged][-1] == 3 and second.finished
    Trainer(build_run(changed(asked, output_dir=str(config.output_dir.with_name("other"))))).run()
    assert runs[-1].settings["id"] != first.settings["id"]


def test_a_tracker_without_pictures_has_the_numbers(config: DistillConfig, tmp_path: Path) -> None:
    tracking = trackers.Tracking(changed(config, **{"monitoring.tracker": "trackio"}), Accelerator(cpu=True))
    tracking.numbers({"a": 1.0}, 1)
    tracking.picture("samples", tmp_path / "no.webp", 1)
    assert not tracking.accelerator.trackers, "nothing was started, and nothing is written"
    given = tracking._run_id(0)
    assert tracking._run_id(3) == given != tracking._run_id(0)
    assert json.loads((config.output_dir / "logs" / "tracker.json").read_text(encoding="utf-8"))["trackio"]

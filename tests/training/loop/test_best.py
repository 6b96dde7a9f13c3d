"""The best checkpoint stays, and a run that does not get better stops."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from tests.helpers.configs import changed
from training.config.schema import DistillConfig
from training.config.sections import CheckpointsSection
from training.loop.best import BestCheckpoints, StoppedEarly
from training.loop.build import build_run
from training.loop.checkpoints import list_checkpoints, update_of
from training.loop.resumption import Resume
from training.loop.trainer import Trainer


def told(values: list[float | None], patience: int | None = None) -> BestCheckpoints:
    lines = [{"expert": "a", "update": 10 * i, "teacher_distance": value} for i, value in enumerate(values)]
    return BestCheckpoints(CheckpointsSection(best="teacher_distance", patience=patience), lines)


def test_the_least_of_a_phase_is_the_best() -> None:
    best = told([0.1, 0.5, 0.3, 0.4, float("nan"), None])
    assert best.update_of("a") == 20, "what was sampled before the first update has no checkpoint"
    best.after_validation("b", 60, {"teacher_distance": 0.9})
    assert best.updates == {20, 60}
    assert BestCheckpoints(CheckpointsSection(), [{"expert": "a", "update": 1, "teacher_distance": 1}]).updates == set()


def test_a_phase_that_does_not_get_better_is_stopped() -> None:
    assert told([0.1, 0.5, 0.3, 0.4], 2).reason_to_stop("a") is None
    assert told([0.1, 0.5, 0.3, 0.4, 0.5, 0.2], 2).reason_to_stop("a") is None
    reason = told([0.1, 0.5, 0.3, 0.4, 0.5], 2).reason_to_stop("a")
    assert reason and "teacher_distance of a was 0.3 after update 20" in reason and "--from-checkpoint 20" in reason


def test_a_run_keeps_its_best_checkpoint_and_stops(config: DistillConfig) -> None:
    keys: dict[str, Any] = {"checkpoints.best": "teacher_distance", "checkpoints.patience": 3, "checkpoints.keep": 1}
    run = changed(config, updates=6, batch_size=2, fake_updates=1, **{**keys, "validation.every": 1})
    distances = iter([0.5, 0.4, 0.2, 0.3, 0.3, 0.3])

    trainer = Trainer(build_run(run))
    with (
        mock.patch.object(BestCheckpoints, "after_validation", _with(distances)),
        pytest.raises(StoppedEarly, match=r"was 0\.2 after update 2 and not better in the 3 validations since"),
    ):
        trainer.run()
    kept = [update_of(path) for path in list_checkpoints(run.output_dir / "checkpoints")]
    assert kept == [2, 5], "the best and the newest"
    assert StoppedEarly.exit_status == 3
    resumed = Trainer(build_run(changed(run, **{"checkpoints.patience": None}), Resume()))
    resumed.run()
    assert resumed.progress.total == 12


def _with(distances: Any) -> Any:
    after = BestCheckpoints.after_validation
    return lambda self, expert, update, measures: after(self, expert, update, {"teacher_distance": next(distances)})

"""Speed and what is left, on a clock that is known."""

from __future__ import annotations

import pytest
import torch

from pdmd_core.evaluations import evaluations_per_update
from pdmd_core.method import Objective
from training.config.schema import DistillConfig
from training.monitoring.speed import Speed


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_second_an_update_is_what_is_told(config: DistillConfig) -> None:
    clock = Clock()
    speed = Speed(config, torch.device("cpu"), clock)
    for update in (1, 2):
        clock.now += 2.0
        performance = speed.after_update(update)
    plan, batch = config.plan.build(), config.batch_size
    each = [sum(evaluations_per_update(plan, k, Objective(), 2, 1).values()) + 1 for k in (0, 1)]
    assert performance.seconds_per_update == pytest.approx(2)
    assert performance.samples_per_second == pytest.approx(batch / 2)
    assert performance.evaluations_per_second == pytest.approx(batch * each[0] / 2)
    assert performance.seconds_left == pytest.approx(2 * (1 + 3 * each[1] / each[0])), "the second phase costs more"
    assert 0 < performance.memory_gib <= performance.peak_memory_gib


def test_what_lies_between_updates_is_left_out(config: DistillConfig) -> None:
    clock = Clock()
    speed = Speed(config, torch.device("cpu"), clock)
    clock.now += 100
    speed.restart()
    clock.now += 1
    assert speed.after_update(1).seconds_per_update == pytest.approx(1)
    clock.now += 50
    speed.restart()
    clock.now += 1
    assert speed.after_update(6).seconds_left == 0

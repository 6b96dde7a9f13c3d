"""In a stock pipeline of diffusers."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor

from pdmd_core.phases import PhasePlan
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.tiny import wan_pipeline
from tests.helpers.walks import PLANS, euler, run


def test_a_stock_pipeline_walks_the_plan_like_an_euler_loop_by_hand_every_time(
    plan: PhasePlan, scheduler: PhasedDMDScheduler
) -> None:
    pipeline = wan_pipeline(scheduler)
    steps = len(plan.sigmas)
    expected = euler(pipeline, plan)
    first, second, other = run(pipeline, steps), run(pipeline, steps), run(pipeline, steps, seed=4)
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(second, first)
    torch.testing.assert_close(other, euler(pipeline, plan, seed=4), rtol=1e-5, atol=1e-5)


def test_stock_schedulers_walk_other_sigmas_in_the_same_pipeline() -> None:
    pipeline = wan_pipeline(FlowMatchEulerDiscreteScheduler(shift=5.0))
    difference = (run(pipeline, 4) - euler(pipeline, PLANS["two phases"])).abs().max()
    assert difference > 0.02, "were it small, the scheduler would not be needed"


def test_a_callback_sees_the_phase_of_the_next_step() -> None:
    plan = PLANS["three phases"]
    seen: list[int] = []

    def look(pipe: WanPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(pipe.scheduler.phase)
        return tensors

    run(wan_pipeline(PhasedDMDScheduler.from_plan(plan)), 4, callback_on_step_end=look)
    assert seen == [1, 1, 2, 2]

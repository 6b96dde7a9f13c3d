"""Each step goes from one sigma of the plan to the next."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from pdmd_core.phases import PhasePlan
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.tiny import randn, wan_pipeline
from tests.helpers.walks import PLANS, run


def test_renoising_jumps_to_the_data_and_back_with_noise_of_its_own_seed() -> None:
    plan = PLANS["two phases"]

    def walk(seed: int, **arguments: object) -> Tensor:
        scheduler = PhasedDMDScheduler.from_plan(plan, sampler="renoise", renoise_seed=seed)
        scheduler.set_timesteps(4)
        x = randn(3, 4)
        for i, timestep in enumerate(scheduler.timesteps):
            x = scheduler.step(randn(3, 4, seed=i + 1), timestep, x, **arguments).prev_sample
        return x

    for given in ({}, {"generator": torch.Generator().manual_seed(7)}):
        generator, x = torch.Generator().manual_seed(7), randn(3, 4)
        for i, (sigma, following) in enumerate(zip(plan.sigmas, [*plan.sigmas[1:], 0.0], strict=True)):
            x0 = x - sigma * randn(3, 4, seed=i + 1)
            x = x0 if following == 0 else (1 - following) * x0 + following * torch.randn(3, 4, generator=generator)
        torch.testing.assert_close(walk(8 if given else 7, **given), x)
    assert not torch.equal(walk(7), walk(8))
    scheduler = PhasedDMDScheduler.from_plan(plan, sampler="renoise")
    pipeline = wan_pipeline(scheduler)
    assert torch.equal(run(pipeline, 4), run(pipeline, 4)), "set_timesteps starts the noise again"
    with pytest.raises(ValueError, match="euler or renoise, found 'ddim'"):
        PhasedDMDScheduler.from_plan(plan, sampler="ddim")


def test_a_step_after_the_last_is_an_error() -> None:
    scheduler = PhasedDMDScheduler.from_plan(PLANS["one phase"])
    scheduler.set_timesteps(3)
    for timestep in scheduler.timesteps:
        scheduler.step(torch.zeros(1, 2), timestep, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="all 3 steps are taken"):
        scheduler.step(torch.zeros(1, 2), scheduler.timesteps[-1], torch.zeros(1, 2))


def test_step_is_euler_to_the_next_sigma(plan: PhasePlan, scheduler: PhasedDMDScheduler) -> None:
    scheduler.set_timesteps(len(plan.sigmas))
    x = randn(2, 4, 3)
    assert scheduler.step_index is None
    for i, (sigma, following) in enumerate(zip(plan.sigmas, [*plan.sigmas[1:], 0.0], strict=True)):
        velocity = randn(2, 4, 3, seed=i + 1)
        expected = x + (following - sigma) * velocity
        result = scheduler.step(velocity, scheduler.timesteps[i], x)
        assert scheduler.step_index == i + 1
        torch.testing.assert_close(result.prev_sample, expected, rtol=1e-5, atol=1e-6)
        x = result.prev_sample


def test_step_starts_where_its_timestep_is_and_can_return_a_tuple() -> None:
    scheduler = PhasedDMDScheduler.from_plan(PLANS["two phases"])
    scheduler.set_timesteps(4)
    x, velocity = randn(1, 3), randn(1, 3, seed=1)
    (moved,) = scheduler.step(velocity, 625.0, x, return_dict=False)
    torch.testing.assert_close(moved, x - 0.625 * velocity)
    assert scheduler.step_index == 4


def test_a_begin_index_is_where_the_run_starts() -> None:
    scheduler = PhasedDMDScheduler.from_plan(PLANS["two phases"])
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    assert scheduler.begin_index == 2 and scheduler.phase == 1
    x, velocity = randn(1, 3), randn(1, 3, seed=1)
    moved = scheduler.step(velocity, scheduler.timesteps[2], x).prev_sample
    torch.testing.assert_close(moved, x + (0.625 - 1 / 1.2) * velocity)
    scheduler.set_timesteps(4)
    assert scheduler.begin_index is None and scheduler.step_index is None


def test_half_precision_is_stepped_in_float32_and_keeps_the_model_s_dtype() -> None:
    scheduler = PhasedDMDScheduler.from_plan(PLANS["two phases"])
    scheduler.set_timesteps(4)
    x = 100 * randn(1, 64)
    velocity = randn(1, 64, seed=1).to(torch.bfloat16)
    moved = scheduler.step(velocity, 1000.0, x).prev_sample
    assert moved.dtype == torch.bfloat16
    assert torch.equal(moved, (x - 0.0625 * velocity.float()).to(torch.bfloat16))


def test_phase_is_the_expert_that_owns_each_step(plan: PhasePlan, scheduler: PhasedDMDScheduler) -> None:
    expected = [k for k, phase in enumerate(plan.phases) for _ in phase.sigmas]
    for _ in range(2):
        scheduler.set_timesteps(len(plan.sigmas))
        found = []
        for timestep in scheduler.timesteps:
            found.append(scheduler.phase)
            scheduler.step(torch.zeros(1, 2), timestep, torch.zeros(1, 2))
        assert found == expected
        assert scheduler.phase == len(plan) - 1, "after the last step"


def test_samples_are_neither_scaled_before_the_model_nor_at_the_start() -> None:
    scheduler = PhasedDMDScheduler()
    x = randn(1, 3)
    assert scheduler.scale_model_input(x, 500.0) is x
    assert scheduler.init_noise_sigma == 1.0 and scheduler.order == 1 and len(scheduler) == 1000


def test_a_run_that_begins_at_the_first_step_does_not_look_at_its_timestep() -> None:
    scheduler = PhasedDMDScheduler.from_plan(PhasePlan.from_steps([2, 2], shift=5.0))
    scheduler.set_timesteps()
    scheduler.set_begin_index(0)
    scheduler.step(randn(1, 4), 123.0, randn(1, 4))
    assert scheduler.step_index == 1


def test_half_precision_is_renoised_in_float32() -> None:
    plan = PhasePlan.from_steps([2, 2], shift=5.0)
    scheduler = PhasedDMDScheduler.from_plan(plan, sampler="renoise", renoise_seed=3)
    scheduler.set_timesteps()
    x, velocity = randn(2, 64).bfloat16(), randn(2, 64, seed=1).bfloat16()
    (found,) = scheduler.step(velocity, scheduler.timesteps[0], x, return_dict=False)
    noise, following = torch.randn(2, 64, generator=torch.Generator().manual_seed(3)), plan.sigmas[1]
    expected = (1 - following) * (x.float() - velocity.float()) + following * noise
    assert torch.equal(found, expected.bfloat16())


def test_tokens_with_timesteps_of_their_own_go_where_stock_schedulers_take_them() -> None:
    """As LTX pipelines hold the tokens of given frames."""
    plan = PLANS["two phases"]
    stock, own = FlowMatchEulerDiscreteScheduler(), PhasedDMDScheduler.from_plan(plan)
    stock.set_timesteps(sigmas=list(plan.sigmas))
    own.set_timesteps(4)
    x = y = randn(2, 5, 3)
    held = torch.tensor([[1.0, 0.2, 0.0, 1.0, 0.9]]) * 1000
    for timestep in own.timesteps:
        times, velocity = torch.minimum(timestep.expand(2, 5), held), randn(2, 5, 3, seed=int(timestep))
        x = own.step(velocity, timestep, x, per_token_timesteps=times, return_dict=False)[0]
        y = stock.step(velocity, timestep, y, per_token_timesteps=times, return_dict=False)[0]
        torch.testing.assert_close(x, y)
    own = PhasedDMDScheduler.from_plan(plan, sampler="renoise")
    with pytest.raises(ValueError, match="not renoised"):
        own.step(velocity, 1000.0, x, per_token_timesteps=times)

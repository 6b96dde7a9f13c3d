"""The sigmas and timesteps that are prepared are those of the plan, however they are asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from pdmd_core.phases import PhasePlan
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.tiny import randn, wan_pipeline
from tests.helpers.walks import PLANS, euler, run


def test_sigmas_and_timesteps_are_exactly_the_plan_s(plan: PhasePlan, scheduler: PhasedDMDScheduler) -> None:
    for prepare in (lambda: None, lambda: scheduler.set_timesteps(len(plan.sigmas))):
        prepare()
        assert torch.equal(scheduler.sigmas, torch.tensor([*plan.sigmas, 0.0], dtype=torch.float32))
        assert torch.equal(scheduler.timesteps, torch.tensor(plan.sigmas, dtype=torch.float32) * 1000)


def test_without_a_plan_it_refuses_to_prepare_sigmas_of_its_own_choice() -> None:
    stock = FlowMatchEulerDiscreteScheduler(shift=5.0)
    for scheduler in (PhasedDMDScheduler(), PhasedDMDScheduler.from_config(stock.config)):
        with pytest.raises(ValueError, match="no phase plan: make it with PhasedDMDScheduler"):
            scheduler.set_timesteps(4)
        with pytest.raises(ValueError, match="no phase plan"):
            _ = scheduler.phase


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_inference_steps": 4},
        {"num_inference_steps": 4, "device": "cpu"},
        {"sigmas": np.linspace(1.0, 0.25, 4), "mu": 0.7},
        {"sigmas": [1.0, 0.75, 0.5, 0.25], "device": torch.device("cpu")},
        {"num_inference_steps": 4, "mu": 1.15},
        {"sigmas": [1.0, 0.9375, 0.8333, 0.625]},
        {"timesteps": [1000, 937.5, 833.33, 625]},
        {},
    ],
    ids=lambda arguments: ",".join(arguments) or "nothing",
)
def test_however_a_pipeline_asks_the_plan_s_steps_are_prepared(arguments: dict[str, object]) -> None:
    scheduler = PhasedDMDScheduler.from_plan(PLANS["two phases"])
    scheduler.set_timesteps(**arguments)
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)
    assert scheduler.num_inference_steps == 4


@pytest.mark.parametrize("wrong", [1, 3, 5, 50])
def test_a_wrong_number_of_steps_is_an_error_that_names_the_right_one(wrong: int) -> None:
    scheduler = PhasedDMDScheduler.from_plan(PLANS["two phases"])
    for arguments in ({"num_inference_steps": wrong}, {"sigmas": [0.5] * wrong}, {"timesteps": [1.0] * wrong}):
        scheduler.set_timesteps(**arguments)
        with pytest.raises(ValueError, match=f"for 4 steps, found {wrong}: ask for 4, or allow more with refine"):
            scheduler.step(randn(1, 2), 1000.0, randn(1, 2))
    scheduler.set_timesteps(4)
    assert scheduler.step(randn(1, 2), 1000.0, randn(1, 2)).prev_sample.shape == (1, 2)
    with pytest.raises(ValueError, match="ask for 4"):
        run(wan_pipeline(scheduler), steps=wrong)


@pytest.mark.parametrize(
    "arguments",
    [{"sigmas": [1.0, 0.9, 0.75, 0.5]}, {"sigmas": [0.9, 0.7, 0.5, 0.3]}, {"timesteps": [1000, 750, 500, 250]}],
    ids=["other sigmas", "uniform, but not from 1", "uniform timesteps"],
)
def test_sigmas_of_the_caller_s_own_that_are_not_the_plan_s_are_refused(arguments: dict[str, list[float]]) -> None:
    scheduler = PhasedDMDScheduler.from_plan(PLANS["two phases"])
    with pytest.raises(ValueError, match=r"given are not the plan's: expected sigmas 1.0000, 0.9375, 0.8333, 0.6250"):
        scheduler.set_timesteps(**arguments)
    if arguments.get("sigmas", [1.0])[0] < 1:
        return
    with scheduler.counting_only():
        scheduler.set_timesteps(**arguments)
    assert torch.equal(scheduler.sigmas, torch.tensor([*scheduler.plan.sigmas, 0.0]))


def test_a_pipeline_that_computes_steps_of_its_own_from_midway_is_refused() -> None:
    scheduler = PhasedDMDScheduler.from_plan(PLANS["two phases"])
    with scheduler.counting_only(), pytest.raises(ValueError, match=r"starts midway, at sigma 0\.9, where the"):
        scheduler.set_timesteps(sigmas=[0.9, 0.7, 0.5, 0.3])


@pytest.mark.parametrize("steps", [4, 5, 8, 13])
def test_refinement_walks_more_steps_when_it_is_asked_for(steps: int) -> None:
    plan = PLANS["two phases"]
    scheduler = PhasedDMDScheduler.from_plan(plan, refine=True)
    scheduler.set_timesteps(steps)
    assert torch.equal(scheduler.sigmas, torch.tensor([*plan.refined(steps).sigmas, 0.0]))
    phases = []
    for timestep in scheduler.timesteps:
        phases.append(scheduler.phase)
        scheduler.step(torch.zeros(1, 2), timestep, torch.zeros(1, 2))
    assert phases == [plan.phase_index(sigma) for sigma in plan.refined(steps).sigmas]
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="found 3: ask for that or more"):
        scheduler.step(torch.zeros(1, 2), 1000.0, torch.zeros(1, 2))
    pipeline = wan_pipeline(scheduler)
    torch.testing.assert_close(run(pipeline, steps), euler(pipeline, plan.refined(steps)), rtol=1e-5, atol=1e-5)


def test_sigmas_a_little_beside_the_plans_are_refused_and_rounded_ones_taken() -> None:
    plan = PhasePlan.from_steps([2, 2], shift=5.0)
    scheduler = PhasedDMDScheduler.from_plan(plan)
    scheduler.set_timesteps(sigmas=[round(sigma, 3) for sigma in plan.sigmas])
    with pytest.raises(ValueError, match="the sigmas given are not the plan's"):
        scheduler.set_timesteps(sigmas=[*plan.sigmas[:3], plan.sigmas[3] - 0.01])


def test_index_for_timestep_finds_every_step_also_after_rounding(
    plan: PhasePlan, scheduler: PhasedDMDScheduler
) -> None:
    for i, timestep in enumerate(scheduler.timesteps):
        for form in (timestep, float(timestep), timestep.double(), float(timestep) + 0.4):
            assert scheduler.index_for_timestep(form) == i


def test_a_timestep_that_is_not_the_plan_s_is_an_error_that_lists_the_plan_s() -> None:
    scheduler = PhasedDMDScheduler.from_plan(PLANS["two phases"])
    for timestep in (950.0, 0.0, 0.9375, 1002.0):
        with pytest.raises(ValueError, match=r"not one of the plan's: 1000.00, 937.50, 833.33, 625.00$"):
            scheduler.index_for_timestep(timestep)


def test_scale_noise_mixes_sample_and_noise_at_the_sigma_of_each_timestep() -> None:
    scheduler = PhasedDMDScheduler.from_plan(PLANS["two phases"])
    sample, noise = randn(4, 3, 2, 2), randn(4, 3, 2, 2, seed=1)
    sigma = torch.tensor(scheduler.plan.sigmas).view(4, 1, 1, 1)
    expected = (1 - sigma) * sample + sigma * noise
    found = scheduler.scale_noise(sample, scheduler.timesteps, noise)
    torch.testing.assert_close(found, expected)
    assert torch.equal(scheduler.add_noise(sample, noise, scheduler.timesteps), found)
    for timestep in (scheduler.timesteps[1], scheduler.timesteps[1:2]):
        torch.testing.assert_close(
            scheduler.scale_noise(sample, timestep, noise), 0.0625 * sample + 0.9375 * noise, rtol=1e-5, atol=1e-6
        )
    assert torch.equal(scheduler.scale_noise(sample, scheduler.timesteps[:1], noise), noise)
    assert scheduler.scale_noise(sample.bfloat16(), scheduler.timesteps, noise.bfloat16()).dtype == torch.bfloat16


def test_noise_can_be_added_at_any_timestep_after_any_number_of_steps() -> None:
    """As diffusers' common tests of schedulers do it; an inpainting pipeline may add noise between the plan's steps."""
    scheduler = PhasedDMDScheduler.from_plan(PLANS["two phases"])
    scheduler.set_timesteps(50)
    sample, noise = randn(4, 3, 8, 8), randn(4, 3, 8, 8, seed=1)
    assert scheduler.add_noise(sample, noise, scheduler.timesteps[5][None]).shape == sample.shape
    torch.testing.assert_close(
        scheduler.scale_noise(sample, torch.tensor([300.0]), noise), 0.7 * sample + 0.3 * noise, rtol=0, atol=1e-6
    )
    assert torch.equal(scheduler.scale_noise(sample, torch.tensor([0.0]), noise), sample)


def test_uniform_timesteps_beside_uniform_sigmas_are_counted() -> None:
    """CogView4 gives both, with timesteps in integers."""
    scheduler = PhasedDMDScheduler.from_plan(PLANS["two phases"])
    timesteps = np.linspace(1000, 1, 4).astype(np.int64)
    scheduler.set_timesteps(timesteps=timesteps, sigmas=timesteps / 1000, mu=0.5)
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)

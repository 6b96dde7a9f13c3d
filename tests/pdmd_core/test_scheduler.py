from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from torch import Tensor

from pdmd_core.families import family
from pdmd_core.phases import PhasePlan, PhasePlanError
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.tiny import CALL, LATENT_SHAPE, randn, wan_pipeline

PLANS = {
    "one phase": PhasePlan.from_steps([3], shift=3.0),
    "two phases": PhasePlan.from_steps([2, 2], shift=5.0),
    "three phases": PhasePlan.from_steps([1, 2, 1], shift=5.0),
    "any sigmas": PhasePlan.from_sigmas([[1.0, 0.97], [0.4], [0.2, 0.1]]),
}
WAN = family("wan")


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest) -> PhasePlan:
    return PLANS[request.param]


@pytest.fixture
def scheduler(plan: PhasePlan) -> PhasedDMDScheduler:
    return PhasedDMDScheduler.from_plan(plan)


def run(pipeline: WanPipeline, steps: int, seed: int = 3, **arguments: object) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    call = {**CALL, "guidance_scale": 1.0, "output_type": "latent", **arguments}
    return pipeline(**call, num_inference_steps=steps, generator=generator).frames


@torch.no_grad()
def euler(pipeline: WanPipeline, plan: PhasePlan, seed: int = 3) -> Tensor:
    """The sampling loop by hand."""
    conditioning = WAN.encode_prompts(pipeline, [CALL["prompt"]], CALL["max_sequence_length"])
    x = randn(1, *LATENT_SHAPE, seed=seed)
    for sigma, following in zip(plan.sigmas, [*plan.sigmas[1:], 0.0], strict=True):
        x = x + (following - sigma) * WAN.velocity(pipeline.transformer, x, sigma, conditioning)
    return x


# --- the steps --------------------------------------------------------------


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
        with pytest.raises(ValueError, match=f"distilled for 4 steps, found {wrong}: ask for 4, or allow more with"):
            scheduler.set_timesteps(**arguments)
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
    with pytest.raises(ValueError, match="found 3: ask for that or more"):
        scheduler.set_timesteps(3)
    pipeline = wan_pipeline(scheduler)
    torch.testing.assert_close(run(pipeline, steps), euler(pipeline, plan.refined(steps)), rtol=1e-5, atol=1e-5)


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


# --- timesteps and noise ----------------------------------------------------


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


# --- a stock pipeline -------------------------------------------------------


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


# --- configuration ----------------------------------------------------------


def test_a_saved_scheduler_loads_with_the_same_plan(
    tmp_path: Path, plan: PhasePlan, scheduler: PhasedDMDScheduler
) -> None:
    scheduler.save_pretrained(tmp_path)
    loaded = PhasedDMDScheduler.from_pretrained(tmp_path)
    assert loaded.plan == plan
    assert torch.equal(loaded.sigmas, scheduler.sigmas) and torch.equal(loaded.timesteps, scheduler.timesteps)
    data = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert data["_class_name"] == "PhasedDMDScheduler" and PhasePlan.from_dict(data["plan"]) == plan
    loaded.save_pretrained(tmp_path / "again")
    assert PhasedDMDScheduler.from_pretrained(tmp_path / "again").plan == plan


def test_from_config_keeps_the_plan(plan: PhasePlan, scheduler: PhasedDMDScheduler) -> None:
    copy = PhasedDMDScheduler.from_config(scheduler.config)
    assert copy is not scheduler and copy.plan == plan and torch.equal(copy.sigmas, scheduler.sigmas)


@pytest.mark.parametrize(
    "stock",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_it_takes_the_place_of_a_stock_scheduler(plan: PhasePlan, stock: FlowMatchEulerDiscreteScheduler) -> None:
    given = PhasedDMDScheduler.from_config(stock.config, plan=plan.to_dict())
    assert given.plan == plan and given.timesteps[0] == 1000


def test_a_plan_that_cannot_be_is_refused_when_the_scheduler_is_made() -> None:
    with pytest.raises(PhasePlanError, match="descend"):
        PhasedDMDScheduler(plan={"phases": [{"name": "all_noise", "sigmas": [1.0, 1.0]}]})


def test_the_number_of_train_timesteps_scales_the_timesteps_only() -> None:
    plan = PLANS["two phases"]
    scheduler = PhasedDMDScheduler.from_plan(plan, num_train_timesteps=1)
    assert scheduler.timesteps.tolist() == pytest.approx(plan.sigmas)
    assert scheduler.sigmas.tolist() == pytest.approx([*plan.sigmas, 0.0])


# --- what diffusers' own scheduler tests ask of every scheduler ---------------


def test_the_public_interface_of_a_scheduler_is_there() -> None:
    scheduler = PhasedDMDScheduler.from_plan(PLANS["two phases"])
    for name in ("init_noise_sigma", "scale_model_input", "step", "timesteps", "sigmas", "order", "add_noise"):
        assert hasattr(scheduler, name)
    sample = randn(2, 4, 3, 3)
    assert scheduler.scale_model_input(sample, 1000.0).shape == sample.shape


def test_dict_and_tuple_outputs_are_equivalent_and_keep_the_shape() -> None:
    for shape in ((1, 4), (2, 4, 8, 8), (1, 16, 3, 4, 4)):
        results = []
        for return_dict in (True, False):
            scheduler = PhasedDMDScheduler.from_plan(PLANS["two phases"])
            scheduler.set_timesteps(4)
            results.append(scheduler.step(randn(*shape, seed=1), 1000.0, randn(*shape), return_dict=return_dict))
        as_dict, as_tuple = results
        assert torch.equal(as_dict.prev_sample, as_tuple[0]) and torch.equal(as_dict[0], as_tuple[0])
        assert as_dict.prev_sample.shape == shape


def test_from_pretrained_takes_overrides_and_returns_what_it_does_not_know(tmp_path: Path) -> None:
    PhasedDMDScheduler.from_plan(PLANS["two phases"]).save_config(tmp_path)
    loaded, unknown = PhasedDMDScheduler.from_pretrained(
        tmp_path, refine=True, sampler="renoise", colour="red", return_unused_kwargs=True
    )
    assert loaded.config.refine and loaded.config.sampler == "renoise" and unknown["colour"] == "red"
    assert PhasedDMDScheduler.from_config(loaded.config).config.refine


def test_compatible_schedulers_are_named_and_can_be_made_from_its_config() -> None:
    scheduler = PhasedDMDScheduler.from_plan(PLANS["two phases"])
    assert set(scheduler.compatibles) == {FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler}
    for kind in scheduler.compatibles:
        assert isinstance(kind.from_config(scheduler.config), kind)


def test_it_survives_copy_and_pickle_in_the_middle_of_a_run() -> None:
    scheduler = PhasedDMDScheduler.from_plan(PLANS["two phases"])
    scheduler.set_timesteps(4)
    x = scheduler.step(randn(1, 3, seed=1), 1000.0, randn(1, 3)).prev_sample
    for copied in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert copied.step_index == 1 and copied.phase == 0
        moved = copied.step(randn(1, 3, seed=2), 937.5, x).prev_sample
        assert copied.phase == 1
        torch.testing.assert_close(moved, x + (1 / 1.2 - 0.9375) * randn(1, 3, seed=2))


def test_sigmas_a_little_beside_the_plans_are_refused_and_rounded_ones_taken() -> None:
    plan = PhasePlan.from_steps([2, 2], shift=5.0)
    scheduler = PhasedDMDScheduler.from_plan(plan)
    scheduler.set_timesteps(sigmas=[round(sigma, 3) for sigma in plan.sigmas])
    with pytest.raises(ValueError, match="the sigmas given are not the plan's"):
        scheduler.set_timesteps(sigmas=[*plan.sigmas[:3], plan.sigmas[3] - 0.01])


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

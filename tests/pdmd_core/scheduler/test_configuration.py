"""Configuration, saving and loading, and what diffusers' own tests ask of every scheduler."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from pdmd_core.phases import PhasePlan, PhasePlanError
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.tiny import randn
from tests.helpers.walks import PLANS


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
        other = kind.from_config(scheduler.config)
        assert isinstance(other, kind)
        assert PhasedDMDScheduler.from_config(other.config).config == scheduler.config


def test_it_survives_copy_and_pickle_in_the_middle_of_a_run() -> None:
    scheduler = PhasedDMDScheduler.from_plan(PLANS["two phases"])
    scheduler.set_timesteps(4)
    x = scheduler.step(randn(1, 3, seed=1), 1000.0, randn(1, 3)).prev_sample
    for copied in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert copied.step_index == 1 and copied.phase == 0
        moved = copied.step(randn(1, 3, seed=2), 937.5, x).prev_sample
        assert copied.phase == 1
        torch.testing.assert_close(moved, x + (1 / 1.2 - 0.9375) * randn(1, 3, seed=2))


def test_a_scheduler_of_a_pipeline_that_needs_switching_refuses_to_sample_alone(tmp_path: Path) -> None:
    PhasedDMDScheduler.from_plan(PLANS["two phases"], needs_switching="load_it()").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"do not switch by themselves in a pipeline of diffusers: .* load_it\(\)$"):
        PhasedDMDScheduler.from_pretrained(tmp_path).set_timesteps(4)

"""Saving phased pipelines, and loading them with their base."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines import pipeline_loading_utils
from safetensors.torch import load_file

from pdmd_core.experts import ExpertsError, PhasedExperts
from pdmd_core.loadable import tell_diffusers
from pdmd_core.phases import PhasePlan
from pdmd_core.pipelines import attach_experts, detach_experts, load_phased_pipeline
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.families.cases import CASES
from tests.helpers.pipeline_state import assert_same, public, state_of
from tests.helpers.tiny_pipelines import (
    KINDS,
    PLAN,
    THREE,
    TWO_COMPONENTS,
    euler,
    full_experts,
    lora_experts,
    networks_of,
)


@pytest.mark.parametrize("name", ["wan", "wan_two", "qwen_image"])
def test_saved_and_loaded_it_samples_the_same(name: str, kind: str, tmp_path: Path) -> None:
    case = CASES[name]
    pipe = case.build()
    components = {"components": TWO_COMPONENTS} if (name, kind) == ("wan_two", "lora") else {}
    attach_experts(pipe, KINDS[kind](tmp_path / "experts", pipe, PLAN, **components))
    pipe.scheduler = PhasedDMDScheduler.from_plan(PLAN, sampler="renoise", renoise_seed=3)
    expected, before = case.sample(pipe), state_of(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    assert_same(pipe, before)
    assert torch.equal(case.sample(pipe), expected)
    again = load_phased_pipeline(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert public(again.scheduler.config) == public(pipe.scheduler.config)
    torch.testing.assert_close(case.sample(again), expected, rtol=0, atol=1e-5)
    again.save_pretrained(tmp_path / "saved")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "saved")) is type(case.build())
    third = load_phased_pipeline(str(tmp_path / "saved"))
    third.set_progress_bar_config(disable=True)
    torch.testing.assert_close(case.sample(third), expected, rtol=0, atol=1e-5)


def test_three_full_experts_and_guidance_survive_saving(tmp_path: Path) -> None:
    case = CASES["flux"]
    pipe = case.build()
    attach_experts(pipe, full_experts(tmp_path / "experts", pipe, THREE, guidance_scale=1.5))
    pipe.save_pretrained(tmp_path / "saved")
    again = load_phased_pipeline(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert again.phased.guidance_scale == 1.5 and len(again.phased.networks) == 3
    call = {"true_cfg_scale": 1.0}
    torch.testing.assert_close(case.sample(again, **call), case.sample(pipe, **call), rtol=0, atol=1e-5)
    with pytest.raises(ExpertsError, match="loaded without its base network: load the base itself"):
        detach_experts(again)
    shared = attach_experts(case.build(), again)
    torch.testing.assert_close(case.sample(shared, **call), case.sample(pipe, **call), rtol=0, atol=1e-5)


def test_a_saved_lora_pipeline_is_the_base_to_stock_diffusers(tmp_path: Path) -> None:
    """Also with a LoRA of the user's own, which is not the base's."""
    case = CASES["wan"]
    stock, pipe = case.build(), case.build()
    folder = lora_experts(tmp_path / "experts", pipe, PLAN)
    pipe.load_lora_weights(folder, weight_name="low_noise.safetensors", adapter_name="mine")
    attach_experts(pipe, folder)
    pipe.save_pretrained(tmp_path / "saved")
    assert pipe.get_list_adapters() == {"transformer": ["mine", "phased_high_noise", "phased_low_noise"]}
    saved = load_file(tmp_path / "saved" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == stock.transformer.state_dict().keys()
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0))
    again.set_progress_bar_config(disable=True)
    assert type(again) is diffusers.WanPipeline
    call = {"num_inference_steps": 4, "guidance_scale": 1.0}
    torch.testing.assert_close(case.sample(again, **call), case.sample(stock, **call), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["wan", "wan_two", "flux"])
def test_stock_diffusers_samples_the_same_from_a_saved_folder_or_says_what_loads_it(
    name: str, kind: str, tmp_path: Path
) -> None:
    """The two networks of Wan switch by themselves, and one expert needs no switching."""
    case = CASES[name]
    one = PhasePlan.from_steps([4], shift=5.0)
    for plan in (one, PLAN):
        pipe = case.build()
        components = {"components": TWO_COMPONENTS} if (name, kind) == ("wan_two", "lora") and plan is PLAN else {}
        attach_experts(pipe, KINDS[kind](tmp_path / f"experts {len(plan)}", pipe, plan, **components))
        pipe.save_pretrained(tmp_path / f"saved {len(plan)}")
        stock = DiffusionPipeline.from_pretrained(tmp_path / f"saved {len(plan)}")
        stock.set_progress_bar_config(disable=True)
        assert type(stock) is type(case.build()) and type(stock.scheduler) is PhasedDMDScheduler
        call = {"num_inference_steps": 4, **case.unguided}
        if kind == "full" and (plan is one or name != "flux"):
            torch.testing.assert_close(case.sample(stock, **call), case.sample(pipe), rtol=0, atol=1e-5)
        else:
            with pytest.raises(ValueError, match=r"load the folder with pdmd_core.load_phased_pipeline\(folder\)$"):
                case.sample(stock, **call)


def test_importing_the_package_is_enough_for_stock_diffusers(tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = case.build()
    attach_experts(pipe, full_experts(tmp_path / "experts", pipe, PLAN))
    pipe.save_pretrained(tmp_path / "saved")
    code = (
        "import sys, pdmd_core; from diffusers import DiffusionPipeline; "
        "print(type(DiffusionPipeline.from_pretrained(sys.argv[1]).scheduler).__name__); "
        "from diffusers.pipelines import pipeline_loading_utils as table; assert 'pdmd_core' in table.LOADABLE_CLASSES"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "saved")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split()[-1] == "PhasedDMDScheduler"
    with mock.patch.dict(pipeline_loading_utils.LOADABLE_CLASSES):  # what lets diffusers download one from the Hub
        del pipeline_loading_utils.LOADABLE_CLASSES["pdmd_core"]
        tell_diffusers()
        assert "pdmd_core" in pipeline_loading_utils.LOADABLE_CLASSES, "diffusers was imported first"


def test_a_scheduler_of_the_caller_s_own_walks_the_plan_or_is_refused(kind: str, tmp_path: Path) -> None:
    case = CASES["wan"]
    case.build().save_pretrained(tmp_path / "base")
    folder = KINDS[kind](tmp_path / "experts", case.build(), PLAN, base=str(tmp_path / "base"))
    mine = PhasedDMDScheduler.from_plan(PLAN, refine=True)
    assert load_phased_pipeline(folder, scheduler=mine).scheduler is mine
    load_phased_pipeline(folder).save_pretrained(tmp_path / "saved")
    assert load_phased_pipeline(tmp_path / "saved", scheduler=mine).scheduler is mine
    for source in (folder, tmp_path / "saved"):
        with pytest.raises(ExpertsError, match="walk the sigmas of their own plan, found scheduler= FlowMatchEuler"):
            load_phased_pipeline(source, scheduler=FlowMatchEulerDiscreteScheduler())


def test_components_of_the_caller_s_own_are_taken_or_refused(tmp_path: Path) -> None:
    case = CASES["wan"]
    case.build().save_pretrained(tmp_path / "base")
    network, text_encoder = case.build().transformer, case.build().text_encoder
    folder = lora_experts(tmp_path / "lora", case.build(), PLAN, base=str(tmp_path / "base"))
    pipe = load_phased_pipeline(folder, transformer=network, text_encoder=text_encoder)
    assert pipe.transformer is network and pipe.text_encoder is text_encoder
    folder = full_experts(tmp_path / "full", case.build(), PLAN, base=str(tmp_path / "base"))
    assert load_phased_pipeline(folder, text_encoder=text_encoder).text_encoder is text_encoder
    with pytest.raises(ExpertsError, match="full experts take the place of transformer: leave transformer= out"):
        load_phased_pipeline(folder, transformer=network)


def test_a_plain_pipeline_folder_is_no_phased_one(tmp_path: Path) -> None:
    CASES["wan"].build().save_pretrained(tmp_path)
    with pytest.raises(ExpertsError, match=r"no phased_experts.json, 1 network\(s\) and no phase plan in scheduler/"):
        load_phased_pipeline(tmp_path)


def test_loading_experts_with_their_base(kind: str, tmp_path: Path) -> None:
    case = CASES["wan"]
    case.build().save_pretrained(tmp_path / "base")
    folder = KINDS[kind](tmp_path / "experts", case.build(), PLAN, base=str(tmp_path / "base"))
    expected = euler(case, PLAN, networks_of(case, folder))
    opened = PhasedExperts.open(folder)
    moved = tmp_path / "elsewhere"
    for pipe in (load_phased_pipeline(folder), load_phased_pipeline(str(folder)), load_phased_pipeline(opened)):
        pipe.set_progress_bar_config(disable=True)
        torch.testing.assert_close(case.sample(pipe), expected, rtol=0, atol=1e-5)
    (tmp_path / "base").rename(moved)
    with pytest.raises(ExpertsError, match=r"cannot load the base '.*base' of these .*; pass another as base="):
        load_phased_pipeline(folder)
    pipe = load_phased_pipeline(folder, base=moved)
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(case.sample(pipe), expected, rtol=0, atol=1e-5)
    if kind == "full":
        with pytest.raises(ExpertsError, match="loaded without its base network"):
            detach_experts(pipe)
    else:
        assert type(detach_experts(pipe)) is diffusers.WanPipeline
        assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler and pipe.scheduler.config.shift == 5.0


def test_full_experts_take_the_place_of_the_bases_network(tmp_path: Path) -> None:
    """Its weights need not even be there, nor those of a second network."""
    case = CASES["wan_two"]
    case.build().save_pretrained(tmp_path / "base")
    for path in (tmp_path / "base").glob("transformer*/*.safetensors"):
        path.unlink()
    folder = full_experts(tmp_path / "experts", case.build(), THREE, base=str(tmp_path / "base"))
    pipe = load_phased_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(case.sample(pipe), euler(case, THREE, networks_of(case, folder)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, {"transformer": torch.bfloat16, "default": torch.bfloat16}])
def test_loading_in_another_dtype(kind: str, argument: str, dtype: Any, tmp_path: Path) -> None:
    """As the stock pipeline has it: what diffusers keeps in float32 stays so."""
    case = CASES["wan"]
    case.build().save_pretrained(tmp_path / "base")
    folder = KINDS[kind](tmp_path / "experts", case.build(), PLAN, base=str(tmp_path / "base"))
    stock = DiffusionPipeline.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    expected = {name: value.dtype for name, value in stock.transformer.state_dict().items()}
    assert len(set(expected.values())) == 2
    pipe = load_phased_pipeline(folder, **{argument: dtype})
    pipe.set_progress_bar_config(disable=True)
    for network in pipe.phased.networks or [pipe.transformer]:
        found = {name.replace(".base_layer", ""): v.dtype for name, v in network.state_dict().items()}
        assert {name: found[name] for name in expected} == expected
    assert case.sample(pipe).isfinite().all()


def test_a_device_map(kind: str, tmp_path: Path) -> None:
    case = CASES["wan"]
    case.build().save_pretrained(tmp_path / "base")
    folder = KINDS[kind](tmp_path / "experts", case.build(), PLAN, base=str(tmp_path / "base"))
    pipe = load_phased_pipeline(folder, device_map="cpu")
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(case.sample(pipe), euler(case, PLAN, networks_of(case, folder)), rtol=0, atol=1e-5)
    if kind == "full":
        with pytest.raises(ExpertsError, match="device_map='balanced' cannot place full experts"):
            load_phased_pipeline(folder, device_map="balanced")


def test_an_empty_base_is_not_the_base_that_lies_beside_the_experts(tmp_path: Path) -> None:
    pipe = CASES["wan"].build()
    attach_experts(pipe, lora_experts(tmp_path / "experts", pipe, PLAN)).save_pretrained(tmp_path / "saved")
    with pytest.raises(ExpertsError, match="''"):
        load_phased_pipeline(tmp_path / "saved", base="")

"""Attaching, detaching, sharing, saving and loading; what does not fit is refused and changes nothing."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import nn

from pdmd_core.experts import ExpertsError, PhasedExperts
from pdmd_core.phases import PhasePlan
from pdmd_core.pipelines import attach_experts, detach_experts, load_phased_pipeline
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.tiny_pipelines import (
    CASES,
    GIVEN,
    Case,
    euler,
    first_call,
    flux,
    full_experts,
    lora_experts,
    networks_of,
    qwen_image_to_image,
    random_lora,
)

PLAN = PhasePlan.from_steps([2, 2], shift=5.0)
THREE = PhasePlan.from_steps([1, 2, 1], shift=5.0)
KINDS = {"lora": lora_experts, "full": full_experts}
TWO_COMPONENTS = ["transformer", "transformer_2"]


@pytest.fixture(params=["lora", "full"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what diffusers notes down itself, when it saves, say."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def state_of(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Everything about a pipeline that attaching could change."""
    found: dict[str, Any] = {"class": type(pipe), "config": public(pipe.config), "attributes": set(pipe.__dict__)}
    for name, component in pipe.components.items():
        found[name] = component
        if isinstance(component, nn.Module):
            found[f"{name} modules"] = [(n, type(m), m._forward_pre_hooks) for n, m in component.named_modules()]
            found[f"{name} weights"] = {k: (v, v.clone()) for k, v in component.state_dict(keep_vars=True).items()}
            found[f"{name} attributes"] = {k: v for k, v in component.__dict__.items() if k.startswith(("peft", "_hf"))}
    return found


def assert_same(pipe: DiffusionPipeline, before: dict[str, Any]) -> None:
    after = state_of(pipe)
    assert after.keys() == before.keys()
    for name, value in before.items():
        if name.endswith("weights"):
            assert after[name].keys() == value.keys()
            for key, (tensor, copy) in value.items():
                assert after[name][key][0] is tensor and torch.equal(tensor, copy)
        elif name in pipe.components:
            assert after[name] is value
        else:
            assert after[name] == value


# --- attach and detach ----------------------------------------------------------


@pytest.mark.parametrize("name", ["wan", "wan_two", "wan_image_to_video", "flux", "stable_diffusion_3"])
def test_detaching_gives_the_pipeline_back(name: str, kind: str, tmp_path: Path) -> None:
    case = CASES[name]
    pipe, call = case.build(), {"num_inference_steps": 4, **case.no_guidance}
    components = {"components": TWO_COMPONENTS} if (name, kind) == ("wan_two", "lora") else {}
    folder = KINDS[kind](tmp_path, pipe, PLAN, **components)
    expected = case.sample(pipe, **call)
    before = state_of(pipe)
    for _ in range(2):
        assert attach_experts(pipe, PhasedExperts.open(folder)) is pipe
        assert torch.equal(case.sample(pipe), euler(case, PLAN, networks_of(case, folder)))
        assert detach_experts(pipe) is pipe
        assert_same(pipe, before)
        assert torch.equal(case.sample(pipe, **call), expected)


def test_three_full_experts_leave_no_component_behind(tmp_path: Path) -> None:
    pipe = CASES["flux"].build()
    before = state_of(pipe)
    attach_experts(pipe, full_experts(tmp_path, pipe, THREE))
    assert {"transformer", "transformer_2", "transformer_3"} <= set(pipe.components)
    detach_experts(pipe)
    assert_same(pipe, before)


def test_a_phased_pipeline_is_still_one_of_its_class(kind: str, tmp_path: Path) -> None:
    pipe = CASES["qwen_image"].build()
    attach_experts(pipe, KINDS[kind](tmp_path, pipe, PLAN))
    assert isinstance(pipe, diffusers.QwenImagePipeline)
    assert type(pipe).__name__ == "QwenImagePipeline" and "Phased" in repr(type(pipe))
    assert pipe.phased.plan == PLAN


def test_a_base_moved_meanwhile_comes_back_where_the_pipeline_is(tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = case.build()
    attach_experts(pipe, full_experts(tmp_path, pipe, PLAN))
    pipe.to(torch.bfloat16)
    detach_experts(pipe)
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert case.sample(pipe, num_inference_steps=4, guidance_scale=1.0).isfinite().all()


def test_twice_and_never(kind: str, tmp_path: Path) -> None:
    pipe = CASES["wan"].build()
    with pytest.raises(ExpertsError, match="has no phased experts to detach"):
        detach_experts(pipe)
    folder = KINDS[kind](tmp_path, pipe, PLAN)
    attach_experts(pipe, folder)
    before = state_of(pipe)
    with pytest.raises(ExpertsError, match="already has phased experts: call detach_experts first"):
        attach_experts(pipe, folder)
    assert_same(pipe, before)


def edited(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    manifest = json.loads((folder / "phased_experts.json").read_text())
    edit(manifest)
    (folder / "phased_experts.json").write_text(json.dumps(manifest))
    return folder


def rewritten(folder: Path, name: str, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> Path:
    """Other tensors in an expert's file, with a manifest that vouches for them."""
    from pdmd_core.experts.files import sha256_of

    path = folder / f"{name}.safetensors"
    save_file({k: v.contiguous() for k, v in (change(*entry) for entry in load_file(path).items())}, path)

    def vouch(manifest: dict[str, Any]) -> None:
        next(e for e in manifest["experts"] if e["name"] == name)["sha256"] = sha256_of(path)

    return edited(folder, vouch)


def other_shape(key: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    return key, value[..., :-1] if key.endswith(("lora_down.weight", "lora_A.weight", "proj_out.weight")) else value


def other_rank(key: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    return key, value[:2] if key.endswith(("lora_down.weight", "lora_A.weight")) else value


def other_modules(key: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    return key.replace("blocks.1", "blocks.7").replace("transformer_blocks.1", "transformer_blocks.7"), value


MISFITS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no folder": ("wan", lambda f: f / "nowhere", "neither a folder nor a Hub id"),
    "another architecture": (
        "qwen_image",
        lambda f: lora_experts(f, CASES["wan"].build(), PLAN),
        r"are of a WanTransformer3DModel \(tiny/base\), the pipeline has a QwenImageTransformer2DModel",
    ),
    "missing file": (
        "wan",
        lambda f: (lora_experts(f, CASES["wan"].build(), PLAN) / "low_noise.safetensors").unlink() or f,
        "low_noise.safetensors of expert 'low_noise' is missing",
    ),
    "damaged file": (
        "wan",
        lambda f: (lora_experts(f, CASES["wan"].build(), PLAN) / "low_noise.safetensors").write_bytes(b"x") and f,
        "sha256 is .* the file was changed or cut off",
    ),
    "LoRA of another width": (
        "wan",
        lambda f: rewritten(lora_experts(f, CASES["wan"].build(), PLAN), "low_noise", other_shape),
        "do not fit the pipeline: .*size mismatch",
    ),
    "LoRA of two ranks in a layer": (
        "qwen_image",
        lambda f: rewritten(lora_experts(f, CASES["qwen_image"].build(), PLAN), "low_noise", other_rank),
        "do not fit the pipeline: .*size mismatch",
    ),
    "LoRA of other modules": (
        "wan",
        lambda f: rewritten(lora_experts(f, CASES["wan"].build(), PLAN), "low_noise", other_modules),
        "only 6 of its 12 adapted modules exist in the pipeline's WanTransformer3DModel",
    ),
    "full experts of another width": (
        "wan",
        lambda f: rewritten(full_experts(f, CASES["wan"].build(), PLAN), "low_noise", other_shape),
        "low_noise.safetensors does not fit a WanTransformer3DModel of the base 'tiny/base': .*proj_out.weight",
    ),
    "full experts with other modules": (
        "wan",
        lambda f: rewritten(full_experts(f, CASES["wan"].build(), PLAN), "low_noise", other_modules),
        "low_noise.safetensors does not fit .*Missing key",
    ),
    "two networks for a pipeline with one": (
        "wan",
        lambda f: lora_experts(f, CASES["wan_two"].build(), PLAN, TWO_COMPONENTS),
        "belong to two networks, this WanPipeline has one: use 'tiny/base'",
    ),
    "only the second network of a pipeline with one": (
        "wan",
        lambda f: lora_experts(f, CASES["wan_two"].build(), PLAN, ["transformer_2"] * 2),
        "belong to two networks, this WanPipeline has one",
    ),
    "full experts of two networks for a pipeline with one": (
        "wan",
        lambda f: edited(
            full_experts(f, CASES["wan"].build(), PLAN), lambda m: m["experts"][1].update(component="transformer_2")
        ),
        "belong to two networks, this WanPipeline has one: use 'tiny/base'",
    ),
    "one network for a pipeline with two": (
        "wan_two",
        lambda f: lora_experts(f, CASES["wan"].build(), PLAN),
        "adapt one network, this WanPipeline has two",
    ),
    "networks in the wrong order": (
        "wan_two",
        lambda f: lora_experts(f, CASES["wan_two"].build(), PLAN, TWO_COMPONENTS[::-1]),
        "belong to transformer, then transformer_2, found transformer_2, transformer",
    ),
    "a third network": (
        "wan_two",
        lambda f: edited(
            full_experts(f, CASES["wan"].build(), PLAN), lambda m: m["experts"][1].update(component="transformer_3")
        ),
        "belong to transformer or transformer_2, found transformer, transformer_3",
    ),
    "LoRA and full": (
        "wan",
        lambda f: edited(
            full_experts(f, CASES["wan"].build(), PLAN),
            lambda m: m["experts"][1].update(kind="lora", rank=4, alpha=4.0, targets=["to_q"]),
        ),
        "partly LoRA, partly full",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("styled", [False, True], ids=["plain", "with a LoRA of the user's own"])
def test_what_does_not_fit_is_refused_and_changes_nothing(misfit: str, styled: bool, tmp_path: Path) -> None:
    name, make, message = MISFITS[misfit]
    pipe, folder = CASES[name].build(), make(tmp_path)
    if styled:
        state = {f"{k}.weight": v for k, v in random_lora(pipe.transformer, 2, seed=7).items()}
        pipe.transformer.load_lora_adapter(state, prefix=None, adapter_name="style")
    before = state_of(pipe)
    active = pipe.transformer.active_adapters() if styled else None
    with pytest.raises(ExpertsError, match=message) as caught:
        attach_experts(pipe, folder)
    assert "\n" not in str(caught.value)
    assert_same(pipe, before)
    if styled:
        assert pipe.transformer.active_adapters() == active


def test_a_pipeline_without_a_transformer_is_refused(tmp_path: Path) -> None:
    folder = lora_experts(tmp_path, CASES["wan"].build(), PLAN)
    pipe = CASES["wan"].build()
    pipe.transformer = None
    with pytest.raises(ExpertsError, match="a WanPipeline without a transformer cannot take phased experts"):
        attach_experts(pipe, folder)


# --- sharing with other pipelines ------------------------------------------------


def image_to_image(kind: str, folder: Path) -> tuple[DiffusionPipeline, DiffusionPipeline, dict[str, Any]]:
    case = CASES["qwen_image"]
    pipe = case.build()
    attach_experts(pipe, KINDS[kind](folder, pipe, PLAN))
    other = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert type(other) is diffusers.QwenImageImg2ImgPipeline
    call = {**case.call, "image": GIVEN, "strength": 1.0, "output_type": "latent", "return_dict": False}
    return pipe, other, call


def test_another_pipeline_shares_the_experts_of_the_first(kind: str, tmp_path: Path) -> None:
    pipe, other, call = image_to_image(kind, tmp_path)
    fresh = attach_experts(qwen_image_to_image(), PhasedExperts.open(tmp_path))
    expected = fresh(**call, generator=torch.Generator().manual_seed(3))[0]
    before = CASES["qwen_image"].sample(pipe)
    assert attach_experts(other, pipe) is other
    assert other.transformer is pipe.transformer
    for _ in range(2):
        assert torch.equal(other(**call, generator=torch.Generator().manual_seed(3))[0], expected)
        assert torch.equal(CASES["qwen_image"].sample(pipe), before)
    detach_experts(other)
    assert torch.equal(CASES["qwen_image"].sample(pipe), before)
    attach_experts(other, pipe)
    detach_experts(pipe)
    with pytest.raises(ExpertsError, match="were detached from the pipeline that loaded them"):
        other(**call)
    with pytest.raises(ExpertsError, match="the pipeline given as experts has"):
        attach_experts(CASES["qwen_image"].build(), pipe)


def test_a_stock_pipeline_on_shared_networks_is_right_or_an_error(kind: str, tmp_path: Path) -> None:
    """LoRA experts switch below it; of full experts it has only the first."""
    _, other, call = image_to_image(kind, tmp_path)
    fresh = attach_experts(qwen_image_to_image(), PhasedExperts.open(tmp_path))
    expected = fresh(**call, generator=torch.Generator().manual_seed(3))[0]
    call |= {"num_inference_steps": 4, "true_cfg_scale": 1.0, "generator": torch.Generator().manual_seed(3)}
    if kind == "lora":
        assert torch.equal(other(**call)[0], expected)
    else:
        with pytest.raises(RuntimeError, match=r"belongs to the expert 'low_noise'.*attach_experts\(this_pipe"):
            other(**call)
    other.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(RuntimeError, match=r"another scheduler walks this pipeline; call attach_experts"):
        other(**call)


def test_a_pipeline_on_another_network_gets_adapters_of_its_own(tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe, second = case.build(), case.build()
    attach_experts(pipe, lora_experts(tmp_path, pipe, PLAN))
    attach_experts(second, pipe)
    assert second.transformer is not pipe.transformer
    assert torch.equal(case.sample(second), case.sample(pipe))
    detach_experts(pipe)
    assert torch.equal(case.sample(second), euler(case, PLAN, networks_of(case, tmp_path)))


def test_the_same_network_in_two_pipelines_is_named(tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = case.build()
    second = diffusers.WanPipeline.from_pipe(pipe)
    folder = lora_experts(tmp_path, pipe, PLAN)
    attach_experts(pipe, folder)
    before = case.sample(pipe)
    with pytest.raises(ExpertsError, match="carries the phased experts of another pipeline"):
        attach_experts(second, folder)
    assert torch.equal(case.sample(pipe), before)
    with pytest.raises(RuntimeError, match="another scheduler walks this pipeline"):
        case.sample(second, num_inference_steps=4, guidance_scale=1.0)


def test_a_copy_of_the_phased_class_says_what_it_lacks(kind: str, tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = case.build()
    attach_experts(pipe, KINDS[kind](tmp_path, pipe, PLAN))
    copy = type(pipe).from_pipe(pipe)
    with pytest.raises(ExpertsError, match=r"made from a phased one: call attach_experts\(this_pipeline, that"):
        case.sample(copy)
    copy.set_progress_bar_config(disable=True)
    assert torch.equal(case.sample(attach_experts(copy, pipe)), case.sample(pipe))


def test_experts_to_share_must_be_there_and_fit(tmp_path: Path) -> None:
    pipe = CASES["wan"].build()
    with pytest.raises(ExpertsError, match="the pipeline given as experts has none"):
        attach_experts(pipe, CASES["wan"].build())
    attach_experts(pipe, full_experts(tmp_path, pipe, PLAN))
    other = CASES["flux"].build()
    before = state_of(other)
    with pytest.raises(ExpertsError, match="to share are of a WanTransformer3DModel, the pipeline has a FluxTransform"):
        attach_experts(other, pipe)
    assert_same(other, before)


# --- saving and loading -----------------------------------------------------------


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
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert type(again) is diffusers.WanPipeline and type(again.scheduler) is FlowMatchEulerDiscreteScheduler
    call = {"num_inference_steps": 4, "guidance_scale": 1.0}
    torch.testing.assert_close(case.sample(again, **call), case.sample(stock, **call), rtol=0, atol=1e-5)


def test_what_stock_diffusers_sees_of_saved_full_experts(tmp_path: Path) -> None:
    """Two on Wan are right when our scheduler is passed; of others it runs the first alone."""
    case = CASES["wan"]
    pipe = case.build()
    attach_experts(pipe, full_experts(tmp_path / "two", pipe, PLAN))
    pipe.save_pretrained(tmp_path / "saved two")
    scheduler = PhasedDMDScheduler.from_pretrained(tmp_path / "saved two", subfolder="scheduler")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "saved two", scheduler=scheduler)
    stock.set_progress_bar_config(disable=True)
    assert type(stock) is diffusers.WanPipeline
    sampled = case.sample(stock, num_inference_steps=4, guidance_scale=1.0)
    torch.testing.assert_close(sampled, case.sample(pipe), rtol=0, atol=1e-5)
    index = json.loads((tmp_path / "saved two" / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    case = CASES["flux"]
    pipe = case.build()
    folder = full_experts(tmp_path / "flux", pipe, PLAN)
    attach_experts(pipe, folder).save_pretrained(tmp_path / "saved flux")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "saved flux", scheduler=scheduler)
    stock.set_progress_bar_config(disable=True)
    first = [networks_of(case, folder)[0]] * 2
    torch.testing.assert_close(case.sample(stock, num_inference_steps=4), euler(case, PLAN, first), rtol=0, atol=1e-5)


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


# --- while sampling ------------------------------------------------------------------


def test_the_scheduler_must_walk_the_plan(kind: str, tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = case.build()
    stock = pipe.scheduler
    attach_experts(pipe, KINDS[kind](tmp_path, pipe, PLAN))
    expected, own = case.sample(pipe), pipe.scheduler
    for other in (stock, PhasedDMDScheduler(), PhasedDMDScheduler.from_plan(THREE)):
        pipe.scheduler = other
        with pytest.raises(ExpertsError, match=r"PhasedDMDScheduler.from_plan\(pipe.phased.plan\)"):
            case.sample(pipe)
    pipe.scheduler = PhasedDMDScheduler.from_plan(pipe.phased.plan)
    assert pipe.scheduler is not own
    assert torch.equal(case.sample(pipe), expected)


def test_a_phased_scheduler_that_is_there_already_stays(kind: str, tmp_path: Path) -> None:
    pipe = CASES["wan"].build()
    folder = KINDS[kind](tmp_path, pipe, PLAN)
    pipe.scheduler = scheduler = PhasedDMDScheduler.from_plan(PLAN, refine=True)
    assert attach_experts(pipe, folder).scheduler is scheduler
    pipe = CASES["wan"].build()
    pipe.scheduler = PhasedDMDScheduler.from_plan(THREE)
    assert attach_experts(pipe, folder).scheduler.plan == PLAN


def test_a_replaced_network_is_no_expert(kind: str, tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = case.build()
    attach_experts(pipe, KINDS[kind](tmp_path, pipe, PLAN))
    pipe.transformer = case.build().transformer
    with pytest.raises(ExpertsError, match=r"pipe.transformer was replaced and is no phased expert"):
        case.sample(pipe)


@pytest.mark.parametrize("name", ["wan", "qwen_image", "flux", "stable_diffusion_3", "z_image"])
def test_another_number_of_steps_names_the_right_one(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    pipe = case.build()
    attach_experts(pipe, full_experts(tmp_path, pipe, PLAN))
    expected = case.sample(pipe)
    with pytest.raises(ValueError, match="distilled for 4 steps, found 50: ask for 4, or allow more with refine=True"):
        case.sample(pipe, num_inference_steps=50)
    assert torch.equal(case.sample(pipe, num_inference_steps=4), expected)


@pytest.mark.parametrize("name", ["wan", "qwen_image", "flux", "stable_diffusion_3", "z_image"])
def test_no_guidance_unless_it_is_asked_for_which_warns(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One forward a step; with guidance, in the way this pipeline takes it, two samples or two forwards."""
    case = CASES[name]
    pipe = case.build()
    attach_experts(pipe, full_experts(tmp_path, pipe, PLAN))
    seen: list[int] = []
    for network in pipe.phased.networks:
        network.register_forward_pre_hook(
            lambda n, a, k: seen.append(len(a[0] if a else k["hidden_states"])) or None, with_kwargs=True
        )
    logging.getLogger("pdmd_core.pipelines.phased").addHandler(caplog.handler)
    case.sample(pipe)
    assert sum(seen) == 4 and "guidance in them" not in caplog.text
    seen.clear()
    none = 0.0 if name == "z_image" else 1.0
    argument = "true_cfg_scale" if name in ("qwen_image", "flux") else "guidance_scale"
    case.sample(pipe, **{argument: none})
    assert sum(seen) == 4 and "guidance in them" not in caplog.text
    seen.clear()
    case.sample(pipe, **{argument: 3.0}, negative_prompt="blue")
    assert sum(seen) == 8
    assert re.search(rf"{argument}=3.0: these experts were distilled with the teacher's guidance in them", caplog.text)
    assert f"leave it at {none:g}" in caplog.text
    logging.getLogger("pdmd_core.pipelines.phased").removeHandler(caplog.handler)


def test_guidance_of_the_manifest_is_the_default(tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = case.build()
    attach_experts(pipe, full_experts(tmp_path, pipe, PLAN, guidance_scale=2.0))
    assert torch.equal(case.sample(pipe), case.sample(pipe, guidance_scale=2.0))
    assert not torch.equal(case.sample(pipe), case.sample(pipe, guidance_scale=1.0))


def test_the_guidance_input_of_a_guidance_distilled_base_is_left_alone(tmp_path: Path) -> None:
    case = CASES["flux"]
    pipe = flux(guidance_embeds=True)
    attach_experts(pipe, full_experts(tmp_path, pipe, PLAN))
    seen: list[float] = []
    for network in pipe.phased.networks:
        network.register_forward_pre_hook(lambda n, a, k: seen.append(float(k["guidance"])), with_kwargs=True)
    case.sample(pipe)
    case.sample(pipe, guidance_scale=7.0)
    assert seen == [3.5] * 4 + [7.0] * 4


def test_positional_arguments(tmp_path: Path) -> None:
    case = CASES["qwen_image"]
    pipe = case.build()
    attach_experts(pipe, lora_experts(tmp_path, pipe, PLAN))
    expected = case.sample(pipe)
    call = {k: v for k, v in case.call.items() if k not in ("prompt", "height", "width")}
    noise = {"latents": case.noise(), "output_type": "latent", "return_dict": False}
    assert torch.equal(pipe("a panda", None, 1.0, 32, 32, 4, **call, **noise)[0], expected)
    with pytest.raises(ValueError, match="found 9: ask for 4"):
        pipe("a panda", None, 1.0, 32, 32, 9, **call, **noise)
    with pytest.raises(TypeError, match="unexpected keyword argument 'prompts'"):
        case.sample(pipe, prompts="a panda")


def test_callbacks_see_the_phase_of_the_next_step_and_can_interrupt(kind: str, tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = case.build()
    attach_experts(pipe, KINDS[kind](tmp_path, pipe, PLAN))
    expected, seen = case.sample(pipe), []

    def see(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, pipe.scheduler.phase, round(float(timestep))))
        pipe._interrupt = stop == step
        return tensors

    stop = -1
    assert torch.equal(case.sample(pipe, callback_on_step_end=see), expected)
    assert seen == [(0, 0, 1000), (1, 1, 938), (2, 1, 833), (3, 1, 625)]
    stop = 1
    seen.clear()
    assert not torch.equal(case.sample(pipe, callback_on_step_end=see), expected)
    assert [step for step, *_ in seen] == [0, 1]
    assert torch.equal(case.sample(pipe), expected)


def test_an_error_in_the_middle_leaves_a_pipeline_that_runs(kind: str, tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = case.build()
    attach_experts(pipe, KINDS[kind](tmp_path, pipe, PLAN))
    expected = case.sample(pipe)

    def fail(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        case.sample(pipe, callback_on_step_end=fail)
    assert not pipe.phased.running and not pipe.phased.route.switched
    assert torch.equal(case.sample(pipe), expected)


def test_changing_the_dtype_takes_the_experts_along(kind: str, tmp_path: Path) -> None:
    """In bfloat16 timesteps 876.5 and 875 are one; experts still switch by the step."""
    plan = PhasePlan.from_sigmas([[1.0, 0.8765], [0.875, 0.7]])
    case = CASES["wan"]
    folder = KINDS[kind](tmp_path, case.build(), plan)
    pipe = attach_experts(case.build(), PhasedExperts.open(folder)).to(torch.bfloat16)
    for network in pipe.phased.networks or [pipe.transformer]:
        assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    networks = [network.to(torch.bfloat16) for network in networks_of(case, folder)]
    sampled = case.sample(pipe)
    seen = euler_in_bfloat16(case, plan, networks)
    torch.testing.assert_close(sampled.float(), seen, rtol=0, atol=0.1)


def euler_in_bfloat16(case: Case, plan: PhasePlan, networks: list[nn.Module]) -> torch.Tensor:
    """As ``euler``, with network inputs in bfloat16 as the pipeline makes them."""
    args, kwargs = first_call(case)
    kwargs = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    x, sigmas = case.noise(), torch.tensor([*plan.sigmas, 0.0])
    with torch.no_grad():
        for i in range(4):
            velocity = case.velocity(networks[i // 2], args, kwargs, x.bfloat16(), sigmas[i : i + 1] * 1000)
            x = x + (sigmas[i + 1] - sigmas[i]) * velocity.float()
    return x

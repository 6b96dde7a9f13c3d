"""Attaching, detaching and sharing; what does not fit is refused and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from pdmd_core.experts import ExpertsError, PhasedExperts
from pdmd_core.pipelines import attach, attach_experts, detach_experts, load_phased_pipeline
from tests.helpers.families.cases import CASES
from tests.helpers.families.qwen_image import qwen_image_to_image
from tests.helpers.pipeline_state import assert_same, state_of
from tests.helpers.tiny_pipelines import (
    GIVEN,
    KINDS,
    PLAN,
    THREE,
    TWO_COMPONENTS,
    euler,
    full_experts,
    lora_experts,
    networks_of,
    random_lora,
)


@pytest.mark.parametrize("name", ["wan", "wan_two", "wan_image_to_video", "flux", "stable_diffusion_3"])
def test_detaching_gives_the_pipeline_back(name: str, kind: str, tmp_path: Path) -> None:
    case = CASES[name]
    pipe, call = case.build(), {"num_inference_steps": 4, **case.unguided}
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
    from pdmd_core.hashing import sha256_of

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
        r"has shape \(24, 24\) in this WanTransformer3DModel, the file changes one of .* of another size",
    ),
    "LoRA of two ranks in a layer": (
        "flux",
        lambda f: rewritten(lora_experts(f, CASES["flux"].build(), PLAN), "low_noise", other_rank),
        "to_q.lora_A.weight has shape .*, expected rank 4",
    ),
    "LoRA of other modules": (
        "wan",
        lambda f: rewritten(lora_experts(f, CASES["wan"].build(), PLAN), "low_noise", other_modules),
        "18 of its keys have no place in this WanTransformer3DModel.*were distilled from another base",
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


@pytest.mark.parametrize("name", ["pipelines", "WanPipeline", "load_image", "EMAModel", "NoSuchTransformer2DModel"])
def test_a_manifest_cannot_name_any_class_but_a_network_s(name: str, tmp_path: Path) -> None:
    pipe = CASES["wan"].build()
    pipe.save_pretrained(tmp_path / "base")
    folder = edited(full_experts(tmp_path / "experts", pipe, PLAN), lambda m: m["base"].update(architecture=name))
    with pytest.raises(ExpertsError, match=f"its network '{name}', which is no ModelMixin of diffusers") as caught:
        load_phased_pipeline(folder, base=tmp_path / "base")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["load_image", "WanTransformer3DModel", "NoSuchPipeline", 7])
def test_the_index_of_a_base_cannot_name_any_class_but_a_pipeline_s(name: object, tmp_path: Path) -> None:
    pipe = CASES["wan"].build()
    pipe.save_pretrained(tmp_path / "base")
    folder, index = full_experts(tmp_path / "experts", pipe, PLAN), tmp_path / "base" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": name}))
    with pytest.raises(ExpertsError, match=f"its pipeline {name!r}, which is no DiffusionPipeline of") as caught:
        load_phased_pipeline(folder, base=tmp_path / "base")
    assert "\n" not in str(caught.value)


def test_two_networks_of_no_family_are_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = CASES["wan_two"].build()
    folder, before = KINDS[kind](tmp_path, pipe, PLAN), state_of(pipe)
    monkeypatch.setattr(attach, "known_family", lambda architecture: None)
    with pytest.raises(ExpertsError, match="when a WanPipeline runs which of its two networks is not known") as caught:
        attach_experts(pipe, folder)
    assert len(str(caught.value).splitlines()) == 1
    assert_same(pipe, before)


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
    other = CASES["wan"].build()
    other.scheduler = DDIMScheduler()
    with pytest.raises(ExpertsError, match="its DDIMScheduler does not step along a rectified flow"):
        attach_experts(other, pipe)


def test_the_file_of_each_expert_is_read_once(kind: str, tmp_path: Path, hashed: list[str]) -> None:
    pipe = CASES["wan"].build()
    pipe.save_pretrained(tmp_path / "base")
    folder = KINDS[kind](tmp_path, pipe, PLAN)
    for _ in range(2):
        load_phased_pipeline(folder, tmp_path / "base")
    assert sorted(hashed) == sorted(expert.file for expert in PhasedExperts.open(folder).manifest.experts)

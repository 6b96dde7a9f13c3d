"""Experts that are merged as they take their turns: the samples of full experts, and the base's own bits afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from pdmd_core.experts import ExpertsError, PhasedExperts
from pdmd_core.families import family
from pdmd_core.pipelines import attach_experts, detach_experts, load_phased_pipeline
from tests.helpers.families.cases import CASES
from tests.helpers.lora_layouts import added, save, wan_of_2026
from tests.helpers.pipeline_state import assert_same, state_of
from tests.helpers.tiny import transformer
from tests.helpers.tiny_pipelines import KINDS, PLAN, euler, lora_experts, networks_of


@pytest.fixture(params=[True, "copies"])
def merge(request: pytest.FixtureRequest) -> Any:
    return request.param


def weights(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in pipe.transformer.state_dict().items()}


def assert_base(pipe: DiffusionPipeline, before: dict[str, Tensor]) -> None:
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("name", "merge"), [("wan", True), ("wan_two", True), ("wan_two", "copies"), ("aura_flow", "copies")]
)
def test_samples_are_those_of_adapters_and_the_base_is_as_it_was(name: str, merge: Any, tmp_path: Path) -> None:
    case = CASES[name]
    pipe = case.build()
    components = {"components": ["transformer", "transformer_2"]} if name == "wan_two" else {}
    folder = lora_experts(tmp_path, pipe, PLAN, **components)
    case.sample(pipe, num_inference_steps=4, **case.unguided)
    before = state_of(pipe)
    expected = case.sample(attach_experts(case.build(), folder))
    attach_experts(pipe, folder, merge=merge)
    assert not hasattr(pipe.transformer, "peft_config"), "no adapter is left to compute"
    for _ in range(2):
        torch.testing.assert_close(case.sample(pipe), expected, rtol=1e-4, atol=1e-4)
    detach_experts(pipe)
    assert_same(pipe, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_phase_runs_with_its_sum_and_any_end_restores_the_bits(
    dtype: torch.dtype, merge: Any, tmp_path: Path
) -> None:
    case, name = CASES["wan"], "blocks.0.attn1.norm_q.weight"
    files = [save(tmp_path / f"{n}.safetensors", wan_of_2026(transformer(), family("wan"), n)[0]) for n in (1, 2)]
    experts = PhasedExperts.from_lora_files(PLAN, *files, components=["transformer"] * 2)
    base = transformer().to(dtype).float()
    wholes = [added(copy.deepcopy(base), wan_of_2026(transformer(), family("wan"), n)[1]) for n in (1, 2)]
    pipe = attach_experts(case.build().to(dtype), experts, merge=merge)
    before, seen, noise = weights(pipe), [], case.noise().to(dtype)
    ends: dict[int, BaseException] = {}

    def look(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        seen.append({name: value.clone() for name, value in pipe.transformer.state_dict().items()})
        if step in ends:
            raise ends.pop(step)
        return {}

    for step, error in ((1, KeyboardInterrupt()), (2, RuntimeError("stop"))):
        ends[step] = error
        with pytest.raises(type(error)):
            case.sample(pipe, latents=noise, callback_on_step_end=look)
        assert_base(pipe, before)
    seen.clear()
    case.sample(pipe, latents=noise, callback_on_step_end=look)
    assert_base(pipe, before)
    for step, whole in ((1, wholes[0]), (3, wholes[1])):  # a callback sees the phase of the next step
        for key, value in whole.state_dict().items():
            torch.testing.assert_close(seen[step - 1][key], value.to(dtype), msg="rounded once")
    assert not torch.equal(seen[0][name], before[name])
    with torch.inference_mode():
        case.sample(pipe, latents=noise)
    assert_base(pipe, before)


def test_an_interrupt_while_weights_are_written_is_mended_at_the_end(
    merge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pdmd_core.pipelines import merging

    case, writes = CASES["wan"], 0
    pipe = case.build()
    attach_experts(pipe, lora_experts(tmp_path, pipe, PLAN), merge=merge)
    before, real = weights(pipe), merging._sum

    def interrupted(*given: Any) -> Tensor:
        nonlocal writes
        writes += 1
        if writes == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(merging, "_sum", interrupted)
    with pytest.raises(KeyboardInterrupt):
        case.sample(pipe)
    assert_base(pipe, before)
    torch.testing.assert_close(case.sample(pipe), euler(case, PLAN, networks_of(case, tmp_path)), rtol=1e-4, atol=1e-4)


def test_a_base_that_changes_between_calls_is_what_is_merged_into(merge: Any, tmp_path: Path) -> None:
    """It is moved, cast, loaded anew, or a LoRA is fused into it."""
    case = CASES["wan"]
    pipe = case.build()
    folder = lora_experts(tmp_path / "experts", pipe, PLAN)
    style = lora_experts(tmp_path / "style", pipe, PLAN)
    pipe = attach_experts(case.build(), folder, merge=merge)
    case.sample(pipe)
    pipe.load_lora_weights(str(style), weight_name="low_noise.safetensors", adapter_name="style")
    beside = case.sample(pipe)
    pipe.fuse_lora()
    fused = weights(pipe)
    torch.testing.assert_close(case.sample(pipe), beside, rtol=1e-4, atol=1e-4)
    assert_base(pipe, fused)
    pipe.unload_lora_weights()
    torch.testing.assert_close(case.sample(pipe), beside, rtol=1e-4, atol=1e-4)
    pipe.transformer.to(torch.bfloat16)
    cast = weights(pipe)
    case.sample(pipe)
    assert_base(pipe, cast)


def test_what_cannot_be_merged_is_said_and_nothing_changes(tmp_path: Path) -> None:
    case = CASES["wan"]
    pipe = case.build()
    folder = lora_experts(tmp_path, pipe, PLAN)
    pipe.save_pretrained(tmp_path / "base")
    quantised = case.build()
    torch.nn.Module.to(quantised.transformer.blocks[0].attn1.to_q, torch.float8_e4m3fn)
    before = state_of(quantised)
    with pytest.raises(ExpertsError, match=r"cannot be merged into blocks.0.attn1.to_q.weight, which is quantised in"):
        attach_experts(quantised, folder, merge=True)
    assert_same(quantised, before)
    with pytest.raises(ExpertsError, match=r"merge= is True, False or 'copies', found 'copy'"):
        load_phased_pipeline(folder, tmp_path / "base", merge="copy")  # type: ignore[arg-type]
    first = load_phased_pipeline(folder, tmp_path / "base", merge=True)
    other = type(first).__mro__[1].from_pipe(first, dtype=torch.float32)
    with pytest.raises(ExpertsError, match="merge= is decided where experts are loaded"):
        attach_experts(other, first, merge=True)
    assert attach_experts(other, first).phased.merge is True
    first.transformer.enable_group_offload(torch.device("cpu"), num_blocks_per_group=1, offload_type="block_level")
    with pytest.raises(RuntimeError, match="merged experts cannot be on a network that is offloaded in parts"):
        case.sample(first)
    with pytest.raises(ExpertsError, match="cannot be merged into a network that is offloaded in parts"):
        attach_experts(detach_experts(first), folder, merge=True)
    full = attach_experts(case.build(), KINDS["full"](tmp_path / "full", pipe, PLAN), merge=True)
    assert full.phased.networks, "full experts are as they are"

"""The same weights agree however they are stored; other weights do not."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from pdmd_core.experts import BaseModel, ExpertsError, PhasedExperts
from pdmd_core.experts.format.fingerprint import (
    Comparison,
    base_warning,
    compare,
    fingerprint_of,
    network_weights,
    sample_of,
    sampler_of,
    sampler_of_files,
    take_fingerprint,
)
from tests.helpers.families.flux import flux
from tests.helpers.families.qwen_image import qwen_image
from tests.helpers.families.stable_diffusion_3 import stable_diffusion_3
from tests.helpers.families.wan import wan_image_clip
from tests.helpers.families.z_image import z_image
from tests.helpers.tiny import randn, transformer

ROOT = Path(__file__).resolve().parents[4]
SHIPPED = ROOT / "training/embedded/models"
TEACHER = SHIPPED / "teacher/transformer/diffusion_pytorch_model.safetensors"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Of a trained network: the teacher of this repository, in float32."""
    from safetensors.torch import load_file

    return {name: value.float() for name, value in load_file(TEACHER).items()}


@pytest.fixture(scope="module")
def expected(weights: Weights) -> dict[str, str]:
    return take_fingerprint(weights, sampler_of(weights))


def compared(expected: Mapping[str, str], weights: Mapping[str, Tensor]) -> Comparison:
    return compare(expected, sampler_of(weights))


def matrices(weights: Weights, change: Callable[[Tensor], Tensor], part: str = "blocks.") -> Weights:
    return {name: change(v) if v.ndim == 2 and part in name else v for name, v in weights.items()}


def scaled(value: Tensor) -> Tensor:
    """As files with a scale beside each matrix hold it."""
    return (value / (value.abs().max() / 448)).to(E4M3)


STORED: dict[str, Callable[[Weights], Weights]] = {
    **{
        str(dtype): lambda w, dtype=dtype: {name: value.to(dtype) for name, value in w.items()}  # type: ignore[misc]
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, E4M3, E5M2)
    },
    "float16, then bfloat16": lambda w: {name: value.half().bfloat16() for name, value in w.items()},
    "float8, then bfloat16": lambda w: {name: value.to(E4M3).bfloat16() for name, value in w.items()},
    "float8 e5m2, then float16": lambda w: {name: value.to(E5M2).half() for name, value in w.items()},
    "float8 with scales": lambda w: matrices(w, scaled),
    "int8": lambda w: matrices(w, lambda v: (v / v.abs().amax(1, keepdim=True) * 127).round().to(torch.int8)),
    "packed": lambda w: matrices(w, lambda v: (v * 1000).to(torch.int8).view(torch.uint8).flatten()),
}


@pytest.mark.parametrize("stored", STORED)
def test_the_same_weights_agree_however_they_are_stored(
    weights: Weights, expected: dict[str, str], stored: str
) -> None:
    result = compared(expected, STORED[stored](weights))
    assert not result.different
    passed_over = sum(weights[name].ndim == 2 for name in expected) if stored in ("int8", "packed") else 0
    assert result.compared == len(expected) - passed_over == 27 - passed_over


def test_rounding_never_reaches_the_limits_whatever_the_values_are() -> None:
    """Small, large and lonely values, where the relative error of a dtype is largest."""
    for seed in range(200):
        value = randn(4, 32, seed=seed) * 10.0 ** (seed % 6 - 3)
        value[2, seed % 32] *= 50
        network = {"blocks.0.a.weight": value}
        expected = take_fingerprint(network, sampler_of(network))
        for dtype in (torch.float16, torch.bfloat16, E4M3, E5M2):
            if value.abs().max() < torch.finfo(dtype).max:
                assert not compared(expected, {"blocks.0.a.weight": value.to(dtype)}).different
        assert not compared(expected, {"blocks.0.a.weight": value.half().bfloat16()}).different
        assert not compared(expected, {"blocks.0.a.weight": scaled(value)}).different


@pytest.mark.parametrize(
    ("dtype", "change", "least"), [(torch.float32, 0.02, 26), (torch.bfloat16, 0.02, 26), (E4M3, 0.2, 26)]
)
def test_a_fine_tune_of_everything_is_noticed_in_nearly_every_sample(
    weights: Weights, expected: dict[str, str], dtype: torch.dtype, change: float, least: int
) -> None:
    tuned = {
        name: (value + change * value.square().mean().sqrt() * randn(*value.shape, seed=k)).to(dtype)
        for k, (name, value) in enumerate(weights.items())
    }
    result = compared(expected, tuned)
    assert len(result.different) >= least
    assert change / 2 < sorted(result.different.values())[len(result.different) // 2] < 2 * change


def with_lora(weights: Weights, change: float, part: str) -> Weights:
    """A LoRA of rank 8 merged into the matrices of the blocks whose names have this part, each by a relative change."""
    merged = dict(weights)
    for k, (name, value) in enumerate(weights.items()):
        if value.ndim == 2 and "blocks." in name and part in name:
            product = randn(value.shape[0], 8, seed=k) @ randn(8, value.shape[1], seed=k + 500)
            merged[name] = value + product * (change * value.norm() / product.norm())
    return merged


@pytest.mark.parametrize(("part", "least"), [("", 7), ("attn", 5), ("ffn", 1), ("attn1.to_q", 1)])
def test_a_merged_lora_is_noticed_although_no_norm_changes(
    weights: Weights, expected: dict[str, str], part: str, least: int
) -> None:
    tuned = {name: value.bfloat16() for name, value in with_lora(weights, 0.02, part).items()}
    result = compared(expected, tuned)
    assert len(result.different) >= least
    assert all(weights[name].ndim == 2 for name in result.different)


def test_the_shipped_experts_merged_are_another_base(weights: Weights, expected: dict[str, str]) -> None:
    experts = PhasedExperts.open(SHIPPED / "experts")
    for expert in experts.manifest.experts:
        state, merged = experts.lora_state(expert.name), dict(weights)
        for key in (key for key in state if key.endswith(".lora_A")):
            module = key.removesuffix(".lora_A")
            merged[f"{module}.weight"] = weights[f"{module}.weight"] + state[f"{module}.lora_B"] @ state[key]
        assert set(compared(expected, merged).different) == {n for n in expected if f"{n[:-7]}.lora_A" in state}


def test_one_weight_of_each_kind_is_taken_and_all_depths_are_seen(expected: dict[str, str], weights: Weights) -> None:
    kinds = [name.split(".", 2)[2] for name in expected]
    assert len(set(kinds)) == len(kinds) == len({n.split(".", 2)[2] for n in weights if n.startswith("blocks.")})
    assert {int(name.split(".")[1]) for name in expected} == set(range(6))
    assert len(json.dumps(expected)) < 4000
    for name, text in expected.items():
        value = weights[name]
        row = value[len(value) // 2] if value.ndim > 1 else value
        values = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.bfloat16)
        assert torch.equal(values, row.flatten()[:32].bfloat16())


def test_what_does_not_repeat_is_left_out_beside_blocks() -> None:
    weights = {name: torch.ones(8) for name in ("blocks.0.a", "blocks.1.a", "blocks.0.b", "blocks.1.b", "embed.0.c")}
    assert list(take_fingerprint(weights, sampler_of(weights))) == ["blocks.0.a", "blocks.1.b"]


def test_weights_that_may_vanish_in_float16_are_left_out() -> None:
    weights = {
        "blocks.0.a": torch.zeros(40),
        "blocks.0.b": torch.full((40,), 1e-6),
        "blocks.0.c": torch.full((40,), torch.inf),
        "blocks.0.d": torch.ones(0),
        "blocks.0.e": torch.ones(8, dtype=torch.int8),
        "blocks.0.f": torch.ones(8).to(E4M3),
        "blocks.0.g": torch.tensor(2.0),
        "other": torch.ones(9),
    }
    assert set(take_fingerprint(weights, sampler_of(weights))) == {"blocks.0.g"}


def test_files_and_memory_give_the_same(tmp_path: Path, weights: Weights, expected: dict[str, str]) -> None:
    names = sorted(weights)
    shards = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for shard, part in zip(shards, (names[::2], names[1::2]), strict=True):
        save_file({name: weights[name].bfloat16() for name in part}, shard)
    found, sampler = sampler_of_files(shards)
    assert sorted(found) == names and sampler("absent") is None
    assert take_fingerprint(found, sampler) == expected
    shards[0].write_bytes(shards[0].read_bytes()[:20_000])
    with pytest.raises(ExpertsError, match="became shorter"):
        take_fingerprint(found, sampler)


FAMILIES = {
    "wan image": lambda: wan_image_clip().transformer,
    "qwen_image": lambda: qwen_image().transformer,
    "z_image": lambda: z_image().transformer,
    "flux": lambda: flux().transformer,
    "stable_diffusion_3": lambda: stable_diffusion_3().transformer,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_networks_of_every_family_have_one(name: str) -> None:
    network = FAMILIES[name]()
    expected = fingerprint_of(network)
    assert len(expected) > 8
    assert compared(expected, network_weights(network.bfloat16())) == Comparison(len(expected), {})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
    assert len(compared(expected, network_weights(network)).different) == len(expected)


def test_what_lies_around_a_weight_does_not_matter() -> None:
    """Adapters that are not fused, compiled blocks; what is not there, or no plain tensor, is passed over."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    from pdmd_core.families import family
    from pdmd_core.roles import Roles, RoleSpec

    network = transformer()
    expected = fingerprint_of(network)
    roles = Roles(network, family("wan"), {"mine": RoleSpec("lora", 2, 2.0)})
    nn.init.ones_(roles.parameters("mine")[1])
    network.blocks[0].attn1 = torch.compile(network.blocks[0].attn1)
    weights = network_weights(network)
    assert compared(expected, weights) == Comparison(len(expected), {})
    some = {name: value.to("meta") if "attn" in name else value for name, value in weights.items() if "ffn" not in name}
    left = [name for name in expected if "attn" not in name and "ffn" not in name]
    assert compared(expected, some) == Comparison(len(left), {}) and left
    other = transformer()
    quantize_(other, Int8WeightOnlyConfig())
    matrices = sum(isinstance(m, nn.Linear) for m in (other.get_submodule(n.rpartition(".")[0]) for n in expected))
    result = compared(expected, network_weights(other))
    assert not result.different and len(expected) - matrices <= result.compared < len(expected)
    assert sample_of(torch.zeros(0, 3)) is not None and compare(expected, lambda _: torch.ones(3)).compared == 0


def test_another_architecture_has_nothing_to_compare() -> None:
    assert compared(fingerprint_of(transformer()), network_weights(FAMILIES["qwen_image"]())) == Comparison(0, {})


def test_the_warning_says_what_was_expected_what_was_found_and_what_to_do() -> None:
    first, second, other = (transformer(seed) for seed in (0, 1, 2))
    prints = {"transformer": fingerprint_of(first), "transformer_2": fingerprint_of(second)}
    base = BaseModel("Wan-AI/x", "WanTransformer3DModel", "wan", "main", prints)

    def warning(network: nn.Module, component: str = "transformer") -> str | None:
        return base_warning(base, component, sampler_of(network_weights(network)), "base_1")

    assert warning(first) is None and warning(second, "transformer_2") is None
    assert warning(second, "transformer_3") is None
    text = warning(other) or ""
    assert text.startswith("base_1 has other weights than the transformer of Wan-AI/x at main, ")
    assert f"{len(prints['transformer'])} samples differ, 'blocks." in text and "compare with the base itself" in text
    assert len(text.splitlines()) == 1
    exchanged = warning(second) or ""
    assert exchanged.endswith("it is the transformer_2 of that base: exchange the two networks")
    assert base_warning(BaseModel("x", "y", "z"), "transformer", lambda _: torch.ones(3), "base_1") is None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=32), st.integers(0, 3))
def test_whatever_the_values_their_bfloat16_agrees_and_twice_of_them_does_not(values: list[float], rows: int) -> None:
    weights = {"blocks.0.w": torch.tensor(values).expand(rows, -1).contiguous() if rows else torch.tensor(values)}
    expected = take_fingerprint(weights, sampler_of(weights))
    for dtype in (torch.bfloat16, torch.float16):
        assert not compared(expected, {name: value.to(dtype) for name, value in weights.items()}).different
    assert len(compared(expected, {name: 2 * value for name, value in weights.items()}).different) == len(expected)

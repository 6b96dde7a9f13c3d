from __future__ import annotations

import pytest

from pdmd_core.experts.lora.keys import by_module, split_key, summary


@pytest.mark.parametrize(
    ("key", "module", "meaning"),
    [
        ("diffusion_model.blocks.0.self_attn.q.lora_down.weight", "diffusion_model.blocks.0.self_attn.q", "down"),
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", "transformer.blocks.0.attn1.to_q", "down"),
        ("x.lora_B.default.weight", "x", "up"),
        ("x.lora_B.weight", "x", "up"),
        ("x.lora_B.my-adapter_2.weight", "x", "up"),
        ("x.lora_A", "x", "down"),
        ("x.lora.up.weight", "x", "up"),
        ("x.lora_linear_layer.down.weight", "x", "down"),
        ("x.lora_B.bias", "x", "up bias"),
        ("x.lora_B.default.bias", "x", "up bias"),
        ("lora_unet_blocks_0_ffn_0.alpha", "lora_unet_blocks_0_ffn_0", "alpha"),
        ("blocks.3.norm3.diff", "blocks.3.norm3", "weight difference"),
        ("blocks.3.ffn.0.diff_b", "blocks.3.ffn.0", "bias difference"),
        ("blocks.3.diff_m", "blocks.3", "modulation difference"),
        ("x.dora_scale", "x", "DoRA"),
        ("x.lora_magnitude_vector", "x", "DoRA"),
        ("x.lora_magnitude_vector.default.weight", "x", "DoRA"),
        ("x.lokr_w1_a", "x", "LoKr w1_a"),
        ("x.lokr_w1", "x", "LoKr w1"),
        ("x.hada_w2_b", "x", "LoHa w2_b"),
        ("x.lora_mid.weight", "x", "middle"),
    ],
)
def test_every_suffix_has_a_meaning(key: str, module: str, meaning: str) -> None:
    assert split_key(key) == (module, meaning)


@pytest.mark.parametrize("key", ["x.weight", "lora_A.weight", "x.lora_C.weight", "x.differ", ".alpha"])
def test_other_keys_have_none(key: str) -> None:
    assert split_key(key) is None


def test_two_keys_of_one_meaning_are_not_taken_for_one() -> None:
    keys = ["a.lora_A.weight", "a.lora_down.weight", "a.lora_B.weight", "other"]
    modules, others = by_module(dict.fromkeys(keys))
    assert modules == {"a": {"down": "a.lora_A.weight", "up": "a.lora_B.weight"}}
    assert others == ["a.lora_down.weight", "other"]


def test_modules_that_differ_in_numbers_alone_are_named_once() -> None:
    keys = ["head.diff", *(f"blocks.{n}.attn.k_img.{part}" for n in range(40) for part in ("alpha", "lora_A.weight"))]
    assert summary([*keys, "other"]) == "head.diff, blocks.*.attn.k_img.alpha|lora_A.weight (80), other"

"""LoRA files of networks that have several of diffusers' layers in one weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pdmd_core.experts.lora.alpha import Alphas
from pdmd_core.experts.lora.changes import LowRank
from pdmd_core.experts.lora.file import LoraFile, read_lora
from pdmd_core.experts.lora.layouts import in_layout
from pdmd_core.families import family
from tests.helpers.tiny import randn

FLUX = family("flux")
Q, K, V = (f"transformer_blocks.0.attn.to_{part}.weight" for part in "qkv")


def product(rank: int, seed: int, out: int = 4, scale: float = 0.5, down: Tensor | None = None) -> LowRank:
    return LowRank(randn(rank, 6, seed=seed) if down is None else down, randn(out, rank, seed=seed + 50), scale)


def written(weights: dict[str, list[Any]]) -> tuple[dict[str, Tensor], LoraFile]:
    """A file in the native layout, and what it is read as."""
    file = LoraFile("x", weights, {name: [name] for name in weights})
    tensors = in_layout(file, FLUX.lora_names, "native").tensors
    return tensors, read_lora(tensors, Alphas(), FLUX.lora_names, "x")


def test_products_are_joined_exactly_and_come_apart_again() -> None:
    mlp = "single_transformer_blocks.0.proj_mlp.weight"
    parts = {Q: product(2, 1), K: product(3, 2), V: product(2, 3, scale=2.0)}
    tensors, back = written({name: [part] for name, part in parts.items()} | {mlp: [product(2, 9, out=16)]})
    up = tensors["diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight"]
    assert up.shape == (12, 7) and int(up.count_nonzero()) == 4 * 7
    assert tensors["diffusion_model.single_blocks.0.linear1.lora_up.weight"].shape == (28, 2)
    for name, part in parts.items():
        (found,) = back.weights[name]
        assert isinstance(found, LowRank) and found.down.shape == part.down.shape
        torch.testing.assert_close(found.dense(), part.dense())
    torch.testing.assert_close(back.weights[mlp][0].dense(), product(2, 9, out=16).dense())
    others = {name: change for name, (change,) in back.weights.items() if name not in (*parts, mlp)}
    assert len(others) == 3 and not any(change.dense().any() for change in others.values())


def test_products_with_one_projection_to_the_rank_keep_their_rank() -> None:
    down = randn(2, 6)
    tensors, back = written({name: [product(2, n, down=down)] for n, name in enumerate((Q, K, V))})
    assert tensors["diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight"].shape == (12, 2)
    assert all(torch.equal(change.down, down) for (change,) in back.weights.values())


def test_the_last_modulation_has_its_halves_in_the_other_order() -> None:
    change = product(2, 1)
    tensors, back = written({"norm_out.linear.weight": [change]})
    up = tensors["diffusion_model.final_layer.adaLN_modulation.1.lora_up.weight"]
    assert torch.equal(up, torch.cat([change.up[2:], change.up[:2]]))
    torch.testing.assert_close(back.weights["norm_out.linear.weight"][0].dense(), change.dense())

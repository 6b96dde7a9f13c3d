"""Names of Stable Diffusion 3.5 in LoRA files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pdmd_core.experts.lora.alpha import Alphas
from pdmd_core.experts.lora.file import read_lora
from pdmd_core.families.stable_diffusion_3 import StableDiffusion3Family
from tests.helpers.families.stable_diffusion_3 import stable_diffusion_3
from tests.helpers.tiny import randn

SD3 = StableDiffusion3Family()


def test_targets_are_all_linear_layers_of_the_blocks_but_the_modulation() -> None:
    network = stable_diffusion_3().transformer
    linear = {n for n, m in network.named_modules() if isinstance(m, nn.Linear) and n.startswith("transformer_blocks.")}
    ends = tuple(f".{target}" for target in SD3.lora_targets)
    assert {name for name in linear if not name.endswith(ends)} == {n for n in linear if "norm1" in n}
    assert {SD3.native_module_name(name) for name in linear} == linear
    with pytest.raises(ValueError, match="'x' has no weight of its own"):
        SD3.native_weight_name("x")


@pytest.mark.parametrize("side", ["x_block", "context_block"])
def test_kohya_s_projections_of_attention_are_three_of_diffusers(side: str) -> None:
    down, up = randn(2, 32, seed=1), randn(96, 2, seed=2)
    stem = f"lora_unet_joint_blocks_1_{side}_attn_qkv"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}
    file = read_lora(tensors, Alphas(), SD3.lora_names, "file")
    names = ["to_q", "to_k", "to_v"] if side == "x_block" else ["add_q_proj", "add_k_proj", "add_v_proj"]
    assert list(file.weights) == [f"transformer_blocks.1.attn.{name}.weight" for name in names] and not file.left_out
    for (change,), expected in zip(file.weights.values(), (up @ down).chunk(3), strict=True):
        torch.testing.assert_close(change.dense(), expected)

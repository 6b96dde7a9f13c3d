"""Names of Qwen-Image's modules and weights, its guidance; what it samples is in test_families_pipelines.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from safetensors.torch import save_file
from transformers import Qwen2VLImageProcessorPil

from pdmd_core.experts import lora_to_file
from pdmd_core.families.qwen_image import QwenImageFamily, _size
from pdmd_core.roles import Roles, RoleSpec
from tests.helpers.families.parts import picture
from tests.helpers.families.qwen_image import qwen_image
from tests.helpers.tiny import randn, randomise

QWEN = QwenImageFamily()


@pytest.fixture(scope="module")
def network() -> QwenImageTransformer2DModel:
    return qwen_image().transformer


def test_targets_are_all_linear_layers_of_the_blocks_but_the_modulation(network: QwenImageTransformer2DModel) -> None:
    linear = {n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and "blocks." in n}
    targets = {f"transformer_blocks.{block}.{target}" for block in (0, 1) for target in QWEN.lora_targets}
    modulation = {f"transformer_blocks.{block}.{side}_mod.1" for block in (0, 1) for side in ("img", "txt")}
    assert linear == targets | modulation
    assert {QWEN.native_module_name(name) for name in linear} == linear, "the native layout is diffusers' own"
    assert {QWEN.diffusers_module_name(name) for name in linear} == linear


def test_every_weight_has_its_own_name(network: QwenImageTransformer2DModel) -> None:
    names = set(network.state_dict())
    assert {QWEN.native_weight_name(name) for name in names} == names


@pytest.mark.parametrize(
    "name", ["", "blocks.0.attn.to_q", "transformer_blocks.x.attn.to_q", "transformer_blocks.0.attn.norm_q", "img_in"]
)
def test_a_module_that_cannot_be_adapted_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        QWEN.native_module_name(name)


@pytest.mark.parametrize("name", ["", "blocks.0.attn.to_q.weight", "img_in", "xproj_out.weight"])
def test_a_weight_that_qwen_image_does_not_have_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        QWEN.native_weight_name(name)


@torch.no_grad()
def test_the_stock_pipeline_loads_a_lora_file_at_its_strength(tmp_path: Path) -> None:
    pipeline: QwenImagePipeline = qwen_image()
    roles = Roles(qwen_image().transformer, QWEN, {"high": RoleSpec("lora", 4, 6.0)})
    randomise(roles, "high", seed=1)
    save_file(lora_to_file(roles.state_dict("high"), 6.0, QWEN), tmp_path / "high.safetensors")
    x, conditioning = randn(2, 4, 1, 4, 6), {"prompt_embeds": randn(2, 7, 16), "prompt_mask": torch.ones(2, 7)}
    base = QWEN.velocity(pipeline.transformer, x, 0.7, conditioning)
    pipeline.load_lora_weights(tmp_path, weight_name="high.safetensors")
    expected = roles.velocity("high", x, 0.7, conditioning)
    found = QWEN.velocity(pipeline.transformer, x, 0.7, conditioning)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - base).abs().max() > 0.1


def test_masked_tokens_change_nothing(network: QwenImageTransformer2DModel) -> None:
    x, embeds = randn(1, 4, 1, 4, 4), randn(1, 5, 16)
    short = {"prompt_embeds": embeds, "prompt_mask": torch.ones(1, 5)}
    padded = {
        "prompt_embeds": torch.cat([embeds, randn(1, 3, 16, seed=4)], dim=1),
        "prompt_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]]),
    }
    with torch.no_grad():
        expected, found = (QWEN.velocity(network, x, 0.5, conditioning) for conditioning in (short, padded))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        attended = QWEN.velocity(network, x, 0.5, padded | {"prompt_mask": torch.ones(1, 8)})
    assert (attended - expected).abs().max() > 1e-4


def test_true_guidance_keeps_the_length_of_each_token() -> None:
    positive, negative = randn(2, 4, 1, 4, 6), randn(2, 4, 1, 4, 6, seed=1)
    guided = QWEN.guide(positive, negative, 4.0)
    plain = negative + 4.0 * (positive - negative)
    for top in range(0, 4, 2):
        for left in range(0, 6, 2):
            token = (slice(None), slice(None), slice(None), slice(top, top + 2), slice(left, left + 2))
            length = guided[token].flatten(1).norm(dim=1)
            torch.testing.assert_close(length, positive[token].flatten(1).norm(dim=1))
            cosine = torch.cosine_similarity(guided[token].flatten(1), plain[token].flatten(1))
            torch.testing.assert_close(cosine, torch.ones(2))


@pytest.mark.parametrize(("kind", "side"), [(QwenImageEditPipeline, 37), (QwenImageEditPlusPipeline, 14)])
def test_the_tokens_of_a_picture_are_those_of_the_text_encoder_s_processor(
    kind: type[DiffusionPipeline], side: int
) -> None:
    """At the released sizes, for a sample of 1024x1024."""
    pipe = kind(**dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "processor", "transformer")))
    pixels = 1024 * 1024 if side == 37 else 384 * 384
    shown = picture(size=(64, 64)).resize(_size(pixels, 1.0))
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=12845056)
    grid = processor(shown, return_tensors="pt")["image_grid_thw"]
    assert QWEN.image_tokens(pipe, (16, 1, 128, 128)) == side * side == int(grid.prod()) // 4

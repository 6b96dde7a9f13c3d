"""The shipped teacher, as a diffusers user meets them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5EncoderModel

from training.embedded.features import load_features, see

PROMPTS = ["a panda on a blue background", "a fox on a green background", "a rocket on a black background"]


def names(pixels: Tensor) -> list[str]:
    """What the classifier sees in pixels (count, frames, 3, 64, 64)."""
    network, emoji, backgrounds = load_features()
    seen = see(network, pixels)
    return [f"{emoji[i]} {backgrounds[j]}" for i, j in zip(seen.emoji, seen.background, strict=True)]


def test_the_teacher_is_a_stock_pipeline_of_stock_classes(teacher: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    assert type(pipeline) is WanPipeline
    assert type(pipeline.transformer) is WanTransformer3DModel
    assert type(pipeline.vae) is AutoencoderKLWan
    assert type(pipeline.text_encoder) is UMT5EncoderModel
    assert pipeline.transformer.dtype == pipeline.text_encoder.dtype == torch.float32


def test_shipped_weights_stay_small(teacher: Path) -> None:
    files = [path for path in teacher.parent.rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) >= 4
    assert sum(path.stat().st_size for path in files) <= 25e6
    assert not [path for path in files if path.suffix in (".pt", ".bin", ".pkl", ".ckpt")]


@pytest.mark.parametrize("length", [16, 512])
def test_a_person_would_name_what_the_prompt_shows(teacher: Path, length: int) -> None:
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        PROMPTS,
        width=64,
        height=64,
        num_frames=1,
        num_inference_steps=40,
        guidance_scale=3.0,
        max_sequence_length=length,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    assert names(pictures.float()) == ["panda blue", "fox green", "rocket black"]


def test_the_length_of_the_prompt_s_padding_hardly_matters(teacher: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    x = torch.randn(3, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    velocities = []
    for length in (16, 226, 512):
        embeds, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=length)
        with torch.no_grad():
            velocities.append(pipeline.transformer(x, torch.full((3,), 900.0), embeds, return_dict=False)[0])
    spread = max(float((v - velocities[0]).abs().mean()) for v in velocities[1:])
    assert spread < 0.1 * float(velocities[0].abs().mean())

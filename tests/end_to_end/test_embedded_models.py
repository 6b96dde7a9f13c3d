"""The shipped teacher and experts, as a diffusers user meets them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5EncoderModel

from pdmd_core.experts import PhasedExperts, read_manifest
from pdmd_core.experts.hub.card import card_text
from pdmd_core.scheduler import PhasedDMDScheduler
from training.data.buckets import SampleSize
from training.embedded.features import load_features, see
from training.evaluation.sampler import Sampler

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
    assert len(weights) >= 5
    assert sum(path.stat().st_size for path in files) <= 25e6
    assert not [path for path in files if path.suffix in (".pt", ".bin", ".pkl", ".ckpt")]


def test_the_shipped_card_is_the_one_that_is_generated() -> None:
    folder = Path("training/embedded/models/experts")
    assert (folder / "README.md").read_text("utf-8") == card_text(read_manifest(folder), folder.as_posix(), folder)


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


def test_a_stock_pipeline_with_the_lora_files_gives_the_trainer_s_own_samples(
    teacher: Path, experts: Path, tmp_path: Path
) -> None:
    opened = PhasedExperts.open(experts)
    plan = opened.manifest.plan
    sampler = Sampler(str(teacher), SampleSize(64, 64, 1, 16), PROMPTS, tmp_path, opened)
    pairs = [(prompt, seed) for prompt in range(3) for seed in (0, 1)]
    ours = sampler.with_experts(pairs)

    scheduler = PhasedDMDScheduler.from_pretrained(experts, subfolder="scheduler")
    pipeline = WanPipeline.from_pretrained(teacher, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    adapters = [expert.name for expert in opened.manifest.experts]
    for expert in opened.manifest.experts:
        pipeline.load_lora_weights(experts, weight_name=expert.file, adapter_name=expert.name)
    pipeline.set_adapters(adapters[0])

    def use_expert_of_next_step(pipe: WanPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> object:
        pipe.set_adapters(adapters[pipe.scheduler.phase])
        return tensors

    theirs = pipeline(
        [PROMPTS[prompt] for prompt, _ in pairs],
        width=64,
        height=64,
        num_frames=1,
        num_inference_steps=len(plan.sigmas),
        guidance_scale=1.0,
        max_sequence_length=16,
        generator=[torch.Generator().manual_seed(seed) for _, seed in pairs],
        callback_on_step_end=use_expert_of_next_step,
        output_type="latent",
    ).frames
    torch.testing.assert_close(theirs, ours, atol=2e-4, rtol=0)


def test_clips_move_as_the_prompt_says(teacher: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a panda moves left on a blue background", "a panda moves right on a blue background"]
    clips = pipeline(
        prompts,
        width=64,
        height=64,
        num_frames=9,
        num_inference_steps=40,
        guidance_scale=3.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).frames.float()
    assert clips.shape == (2, 9, 3, 64, 64)
    corner = clips[:, :, :, :1, :1]
    weight = (clips - corner).abs().sum(2).sum(2)
    place = (weight * torch.arange(64.0)).sum(-1) / weight.sum(-1)
    travel = place[:, -1] - place[:, 0]
    assert travel[0] < -6
    assert travel[1] > 6

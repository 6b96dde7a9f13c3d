"""Validation: fixed prompts and seeds through the experts that are there so far."""

from __future__ import annotations

import torch
from torch import Tensor

from pdmd_core.rollout import route, sample
from pdmd_core.velocities import expert_velocities
from training.data.prompt_cache import PromptCache
from training.loop.build import BuiltRun
from training.loop.phase import PhaseTraining
from training.memory.decoding import decoded as in_pixels


def starting_points(run: BuiltRun, prompts: PromptCache) -> tuple[Tensor, Tensor]:
    """What the samples of a validation start from: the same for the experts at any update and for the teacher.

    Args:
        run: The run.
        prompts: What is sampled.

    Returns:
        Index of the prompt of each sample, the seeds of a prompt side by side, and its noise at sigma 1.
    """
    seeds, shape = run.config.validation.seeds, run.data.validation_shape
    noise = torch.randn(seeds, *shape, generator=torch.Generator().manual_seed(run.config.seed))
    return torch.arange(len(prompts)).repeat_interleave(seeds), noise.repeat(len(prompts), *([1] * len(shape)))


@torch.no_grad()
def validation_latents(run: BuiltRun, training: PhaseTraining, prompts: PromptCache) -> list[Tensor]:
    """Sample the fixed prompts and seeds through the experts so far; the last step jumps to sigma 0.

    All processes call this together where they evaluate networks together.

    Args:
        run: The run.
        training: The phase in training, whose expert samples with its averaged weights.
        prompts: What is sampled.

    Returns:
        Latents of the samples, in the parts in which they were made.
    """
    config, plan, device = run.config, run.plan, run.accelerator.device
    indices, noise = starting_points(run, prompts)
    sigmas = [sigma for phase in plan.phases[: training.distiller.phase + 1] for sigma in phase.sigmas]
    at_once = config.memory.micro_batch_size or len(run.data.validation) * config.validation.seeds
    latents = []
    with training.averaged(), run.accelerator.autocast():
        for own, start in zip(indices.split(at_once), noise.split(at_once), strict=True):
            experts = expert_velocities(run.roles, plan, prompts.conditioning(own, device))
            latents.append(sample(route(experts, plan), sigmas, start.to(device)))
    return latents


@torch.no_grad()
def decoded(run: BuiltRun, latents: list[Tensor]) -> Tensor:
    """Decode latents on the device, which the autoencoder leaves again.

    Returns:
        Pixels in [0, 1] on the CPU, of shape (samples, frames, 3, height, width).
    """
    device, how = run.accelerator.device, run.config.validation.decode
    try:
        return torch.cat(list(in_pixels(run.family, run.pipeline, latents, device, how)))
    finally:
        run.pipeline.vae.to("cpu")

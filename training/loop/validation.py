"""Validation: fixed prompts and seeds through the experts that are there so far."""

from __future__ import annotations

import torch
from torch import Tensor

from pdmd_core.distillation import expert_velocities
from pdmd_core.rollout import route, sample
from training.loop.build import BuiltRun
from training.loop.phase import PhaseTraining


@torch.no_grad()
def validation_latents(run: BuiltRun, training: PhaseTraining) -> list[Tensor]:
    """Sample the fixed prompts and seeds through the experts so far; the last step jumps to sigma 0.

    All processes call this together where they evaluate networks together.

    Args:
        run: The run.
        training: The phase in training, whose expert samples with its averaged weights.

    Returns:
        Latents of the samples, the seeds of a prompt side by side, in the parts in which they were made.
    """
    config, data, plan, device = run.config, run.data, run.plan, run.accelerator.device
    seeds = config.validation.seeds
    indices = torch.arange(len(data.validation)).repeat_interleave(seeds)
    noise = torch.randn(seeds, *data.validation_shape, generator=torch.Generator().manual_seed(config.seed))
    noise = noise.repeat(len(data.validation), *([1] * len(data.validation_shape)))
    sigmas = [sigma for phase in plan.phases[: training.distiller.phase + 1] for sigma in phase.sigmas]
    at_once = config.memory.micro_batch_size or len(indices)
    latents = []
    with training.averaged(), run.accelerator.autocast():
        for own, start in zip(indices.split(at_once), noise.split(at_once), strict=True):
            experts = expert_velocities(run.roles, plan, data.validation.conditioning(own, device))
            latents.append(sample(route(experts, plan), sigmas, start.to(device)))
    return latents


@torch.no_grad()
def decoded(run: BuiltRun, latents: list[Tensor]) -> Tensor:
    """Decode latents on the device, which the autoencoder leaves again.

    Returns:
        Pixels in [0, 1] on the CPU, of shape (samples, frames, 3, height, width).
    """
    run.pipeline.vae.to(run.accelerator.device)
    try:
        return torch.cat([run.family.decode(run.pipeline, part).cpu() for part in latents])
    finally:
        run.pipeline.vae.to("cpu")

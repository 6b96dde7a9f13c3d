"""Plans of all kinds, and a tiny pipeline that walks them: by its own loop and by hand."""

from __future__ import annotations

import torch
from diffusers import WanPipeline
from torch import Tensor

from pdmd_core.families import family
from pdmd_core.phases import PhasePlan
from tests.helpers.tiny import CALL, LATENT_SHAPE, randn

PLANS = {
    "one phase": PhasePlan.from_steps([3], shift=3.0),
    "two phases": PhasePlan.from_steps([2, 2], shift=5.0),
    "three phases": PhasePlan.from_steps([1, 2, 1], shift=5.0),
    "any sigmas": PhasePlan.from_sigmas([[1.0, 0.97], [0.4], [0.2, 0.1]]),
}
WAN = family("wan")


def run(pipeline: WanPipeline, steps: int, seed: int = 3, **arguments: object) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    call = {**CALL, "guidance_scale": 1.0, "output_type": "latent", **arguments}
    return pipeline(**call, num_inference_steps=steps, generator=generator).frames


@torch.no_grad()
def euler(pipeline: WanPipeline, plan: PhasePlan, seed: int = 3) -> Tensor:
    """The sampling loop by hand."""
    conditioning = WAN.encode_prompts(pipeline, [CALL["prompt"]], CALL["max_sequence_length"])
    x = randn(1, *LATENT_SHAPE, seed=seed)
    for sigma, following in zip(plan.sigmas, [*plan.sigmas[1:], 0.0], strict=True):
        x = x + (following - sigma) * WAN.velocity(pipeline.transformer, x, sigma, conditioning)
    return x

"""What rebuilding ComfyUI's own workflow templates on tiny networks needs: pictures, an autoencoder, our sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.helpers.comfyui.phased_models import SEED
from tests.helpers.tiny import randn

SIZE = {"width": 32, "height": 32, "length": 5, "batch_size": 1}


@dataclass(frozen=True)
class Encoder:
    """What the nodes ask of an autoencoder: a latent of the right size that depends on the pixels."""

    latent_channels: int = 16
    scale: int = 8

    def spacial_compression_encode(self) -> int:
        return self.scale

    def encode(self, pixels: Tensor) -> Tensor:
        frames, height, width = (pixels.shape[0] - 1) // 4 + 1, *(edge // self.scale for edge in pixels.shape[1:3])
        return randn(1, self.latent_channels, frames, height, width, seed=int(1000 * float(pixels.mean())))


def pictures(count: int, seed: int, edge: int = 32) -> Tensor:
    return torch.rand(count, edge, edge, 3, generator=torch.manual_seed(seed))


def sampled_by_ours(
    pack: Any, experts: list[Any], plan: Any, cfg: str, sampler: str, ready: Any, denoise: float = 1.0
) -> Tensor:
    """With Phased Experts and Phased Sampler. ready: positive, negative, latent."""
    common = {"plan": plan, "cfg": cfg, "set_shift": True}
    models = {f"model_{k + 1}": each for k, each in enumerate(experts)}
    (model,) = pack.call("PhasedDMDExperts", **common, **models)
    inputs = {"seed": SEED, "steps": 0, "cfg": 7.0, "sampler_name": sampler, "denoise": denoise}
    inputs |= {"positive": ready[0], "negative": ready[1], "latent_image": ready[2]}
    return pack.call("PhasedDMDSampler", model=model, **inputs)[0]["samples"]


def plan_of_sigmas(pack: Any, *phases: list[float]) -> Any:
    """Phase Plan (sigmas) with these numbers as a user would paste them. phases: without the final 0."""
    text = " | ".join(", ".join(repr(sigma) for sigma in phase) for phase in phases)
    return pack.call("PhasedDMDPlanFromSigmas", sigmas=text, names="")[0]


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())

"""Phased MODELs: plans and inputs of the nodes that make them, sampling as a graph does it, and their state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pdmd_core.phases import PhasePlan

PLANS = {
    "two experts": PhasePlan.from_steps([2, 2], shift=5.0),
    "three experts": PhasePlan.from_steps([1, 1, 2], shift=3.0),
    "uneven": PhasePlan.from_sigmas([[1.0, 0.9], [0.7], [0.5, 0.2]]),
}
TWO = PLANS["two experts"]
SEED = 42
LOAD = {"hub_id": "", "strength": 1.0, "cfg": "trained", "set_shift": True}
"""What Load Phased Experts takes beside experts and their bases."""


def plan_of(pack: Any, steps: str = "2, 2", shift: float = 5.0) -> Any:
    return pack.call("PhasedDMDPlanFromSteps", steps=steps, shift=shift, names="")[0]


def sigmas_of(plan: PhasePlan) -> Tensor:
    return torch.tensor([*plan.sigmas, 0.0])


def sample(
    pack: Any,
    models: Any,
    model: Any,
    family: str,
    sigmas: Tensor,
    sampler: str = "euler",
    cfg: float = 1.0,
    latent: dict[str, Tensor] | None = None,
    guider: Any = None,
) -> Tensor:
    """SamplerCustomAdvanced, as a graph would call it."""
    (noise,) = pack.call("RandomNoise", noise_seed=SEED)
    if guider is None:
        positive, negative = models.conditioning(family), models.conditioning(family, seed=8)
        (guider,) = pack.call("CFGGuider", model=model, positive=positive, negative=negative, cfg=cfg)
    (choice,) = pack.call("KSamplerSelect", sampler_name=sampler)
    latent = latent or models.latent(family)
    output, _ = pack.call(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=choice, sigmas=sigmas, latent_image=latent
    )
    return output["samples"]


def noise_of(latent: dict[str, Tensor]) -> Tensor:
    return torch.randn(latent["samples"].shape, generator=torch.manual_seed(SEED))


def state(model: Any) -> tuple[Any, ...]:
    """All of a ModelPatcher that patching changes."""
    parts = (model.model_options, model.wrappers, model.callbacks, model.patches, model.object_patches)
    return model.patches_uuid, sorted(model.attachments), repr(parts), model.hook_mode


def with_lora(
    pack: Any,
    model: Any,
    tensors: Mapping[str, Tensor],
    strength: float = 1.0,
    what: str = "file",
    beside: bool = False,
) -> Any:
    """A MODEL with a LoRA, all of whose keys have a place in it."""
    loras, alpha = pack.module("comfy_nodes.loras"), pack.module("pdmd_core.experts.lora.alpha")
    warnings: list[str] = []
    patched = loras.apply_lora(model, loras.Lora(tensors, alpha.Alphas(), what), strength, warnings.append, beside)
    assert not warnings
    return patched

"""The sigmas of a KSampler, for the front end, which replaces pairs of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.samplers

from .errors import NodeError


class _Sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    pass


def ksampler_sigmas(asked: Mapping[str, Any]) -> list[float]:
    """Compute the sigmas that KSampler gives a flow matching MODEL.

    Args:
        asked: ``shift``, as ModelSamplingSD3 or ModelSamplingAuraFlow sets it, ``steps``, ``sampler_name`` and
            ``scheduler``.

    Returns:
        The sigmas, descending, with the final 0.

    Raises:
        NodeError: If there is no such sampler or scheduler.
    """
    sampler, scheduler = str(asked["sampler_name"]), str(asked["scheduler"])
    for name, known in ((sampler, comfy.samplers.KSampler.SAMPLERS), (scheduler, comfy.samplers.KSampler.SCHEDULERS)):
        if name not in known:
            raise NodeError(f"this ComfyUI has no {name[:60]}")
    sampling = _Sampling()
    sampling.set_parameters(shift=float(asked["shift"]), multiplier=1000)
    model = SimpleNamespace(get_model_object=lambda name: sampling)
    device = comfy.model_management.get_torch_device()
    steps = min(max(int(asked["steps"]), 1), 1000)
    found: list[float] = comfy.samplers.KSampler(model, steps, device, sampler, scheduler).sigmas.tolist()
    return found

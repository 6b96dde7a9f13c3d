"""Guidance of velocities: by a second evaluation, or as an input of networks that were distilled for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..flow import at_least_float32

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, FluxTransformer2DModel


def classifier_free_guidance(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Guide a velocity: ``negative + scale * (positive - negative)``.

    Args:
        positive: The velocity with the prompt, of any shape.
        negative: The velocity with the negative prompt, of the same shape.
        scale: The scale of guidance; 1 is none.

    Returns:
        The guided velocity, in float32 or better.
    """
    positive, negative = at_least_float32(positive), at_least_float32(negative)
    return negative + scale * (positive - negative)


def embedded_guidance(network: nn.Module, scale: float, x: Tensor) -> Tensor | None:
    """Make the guidance that a guidance-distilled network takes as an input.

    Args:
        network: A network whose configuration says ``guidance_embeds``, or not.
        scale: The scale of guidance.
        x: Latents, one for each row of the result.

    Returns:
        The scale in float32, of shape (batch,); None for networks that have no such input.
    """
    config = cast("FluxTransformer2DModel", network).config  # or any class with this setting
    return x.new_full((len(x),), scale, dtype=torch.float32) if config.guidance_embeds else None


def pipeline_named(name: object) -> type[DiffusionPipeline] | None:
    """Find a pipeline class by the name that a manifest or a pipeline folder has for it.

    Args:
        name: Anything.

    Returns:
        The class of diffusers; None where it has no pipeline of this name.
    """
    import diffusers

    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline) else None

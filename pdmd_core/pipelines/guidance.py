"""What "no guidance" is in the call of a pipeline: its family says so; of other pipelines it is found out."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from diffusers import DiffusionPipeline

from ..families import known_family
from .networks import COMPONENT, network_of


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance in a pipeline's call."""

    argument: str
    """Which argument of the call sets it."""
    none: float
    """The argument's value for no guidance, from which it counts."""

    def of(self, scale: float) -> float:
        """Tell the argument's value for a scale of guidance.

        Args:
            scale: The scale, counted so that 1 is none.

        Returns:
            The value.
        """
        return scale - 1.0 + self.none


def guidance_of(pipe: DiffusionPipeline) -> Guidance | None:
    """Find how a pipeline's call is guided.

    An input of a guidance-distilled network, such as FLUX's ``guidance_scale``, is no classifier-free guidance: it
    belongs to the base and has to stay as the base has it.

    Args:
        pipe: Any pipeline.

    Returns:
        How, or None where nothing in the call is classifier-free guidance.
    """
    arguments, network = inspect.signature(type(pipe).__call__).parameters, network_of(pipe, COMPONENT)
    family = known_family(type(network).__name__)
    if family is not None:
        for argument, none in family.guidance_arguments(1.0, type(pipe)).items():
            return Guidance(argument, none) if argument in arguments else None
        return None
    if "true_cfg_scale" in arguments:
        return Guidance("true_cfg_scale", 1.0)
    if "guidance_scale" not in arguments:
        return None
    if _guides(pipe, 1.0) is None:  # it does not say
        embedded = "guidance" in inspect.signature(type(network).forward).parameters
        return None if embedded else Guidance("guidance_scale", 1.0)
    if _guides(pipe, 1.0):
        return Guidance("guidance_scale", 0.0)
    return Guidance("guidance_scale", 1.0) if _guides(pipe, 100.0) else None


def _guides(pipe: DiffusionPipeline, scale: float) -> bool | None:
    """Whether a pipeline would guide at this guidance_scale; None where it does not say."""
    before = pipe.__dict__.get("_guidance_scale")
    pipe.__dict__["_guidance_scale"] = scale
    try:
        found = getattr(pipe, "do_classifier_free_guidance", None)
        return found if isinstance(found, bool) else None
    finally:
        pipe.__dict__["_guidance_scale"] = before

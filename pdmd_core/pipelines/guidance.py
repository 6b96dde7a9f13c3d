"""What "no guidance" is in the call of a pipeline: its family says so; of other pipelines it is found out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from diffusers import ClassifierFreeGuidance, DiffusionPipeline

from ..families import known_family
from .networks import COMPONENT, network_of

_BESIDE = {
    "audio_guidance_scale": 1.0,
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_modality_scale": 1.0,
    "guidance_rescale": 0.0,
    "audio_guidance_rescale": 0.0,
    "img_guidance_scale": 1.0,
}
"""Arguments of calls that guide beside classifier-free guidance, with the value at which they do not."""


@dataclass(frozen=True)
class Guidance:
    """A kind of guidance in a pipeline's call."""

    argument: str
    """Which argument of the call sets it."""
    none: float
    """The argument's value for no guidance, from which it counts."""
    follows: bool = True
    """Whether a scale at which experts sample is one of this kind."""

    def of(self, scale: float) -> float:
        """Tell the argument's value for a scale of guidance.

        Args:
            scale: The scale, counted so that 1 is none.

        Returns:
            The value.
        """
        return scale - 1.0 + self.none if self.follows else self.none


def guidances_of(pipe: DiffusionPipeline) -> list[Guidance]:
    """Find how a pipeline's call is guided.

    An input of a guidance-distilled network, such as FLUX's ``guidance_scale``, is no classifier-free guidance: it
    belongs to the base and has to stay as the base has it.

    Args:
        pipe: Any pipeline.

    Returns:
        All that guides in the call.
    """
    arguments = inspect.signature(type(pipe).__call__).parameters
    beside = [Guidance(name, none, follows=False) for name, none in _BESIDE.items() if name in arguments]
    family = known_family(type(network_of(pipe, COMPONENT)).__name__)
    if family is not None:
        unguided = family.guidance_arguments(1.0, type(pipe)).items()
        own = [Guidance(name, none) for name, none in unguided if name not in _BESIDE]
    else:
        own = list(_classifier_free(pipe))
    return [guidance for guidance in own if guidance.argument in arguments] + beside


def _classifier_free(pipe: DiffusionPipeline) -> Iterator[Guidance]:
    arguments = inspect.signature(type(pipe).__call__).parameters
    if "true_cfg_scale" in arguments:
        yield Guidance("true_cfg_scale", 1.0)
    if "guidance_scale" not in arguments:
        return
    if _guides(pipe, 1.0) is None:  # it does not say: with a prompt to guide away from, the scale is no input alone
        negative = {"negative_prompt", "guidance_schedule"} & set(arguments)
        if negative and "true_cfg_scale" not in arguments:
            yield Guidance("guidance_scale", 1.0)
    elif _guides(pipe, 1.0):
        yield Guidance("guidance_scale", 0.0)
    elif _guides(pipe, 100.0):
        yield Guidance("guidance_scale", 1.0)


def _guides(pipe: DiffusionPipeline, scale: float) -> bool | None:
    """Whether a pipeline would guide at this guidance_scale; None where it does not say."""
    before = pipe.__dict__.get("_guidance_scale")
    pipe.__dict__["_guidance_scale"] = scale
    try:
        found = getattr(pipe, "do_classifier_free_guidance", None)
        return found if isinstance(found, bool) else None
    finally:
        pipe.__dict__["_guidance_scale"] = before


def guiders_of(pipe: DiffusionPipeline, scale: float) -> dict[str, ClassifierFreeGuidance]:
    """Make what guides a pipeline in which guidance is a component.

    Args:
        pipe: Any pipeline.
        scale: The scale, counted so that 1 is none.

    Returns:
        By the name of each component that guides, classifier-free guidance of this scale; empty for other pipelines.
    """
    names = [name for name in pipe.config if name == "guider" or name.endswith("_guider")]
    return {name: ClassifierFreeGuidance(guidance_scale=scale) for name in names}

"""Pipelines in which phased experts cannot run, each with its reason."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from ..experts import ExpertsError
from ..scheduler import PhasedDMDScheduler
from .networks import COMPONENT, network_of
from .routing import TIMESTEPS

REASONS = {
    "Cosmos2TextToImagePipeline": "its sigmas go up to 80, with noise added to samples that keep their size",
    "Cosmos2VideoToWorldPipeline": "its sigmas go up to 80, with noise added to samples that keep their size",
    "Flux2KleinKVPipeline": "it keeps keys and values of the first step for all others, and with them its expert: use "
    "Flux2KleinPipeline",
    "HeliosPyramidPipeline": "it samples in stages of growing size, each along sigmas of its own",
    "LTX2DFRTemporalRefinePipeline": "it refines clips that are there, by random steps of a scheduler of its own",
}
REASONS |= {
    f"SkyReelsV2DiffusionForcing{kind}Pipeline": "frames are at noise levels of their own, so no step is of one expert"
    for kind in ("", "ImageToVideo", "VideoToVideo")
}
"""Why pipelines of these classes are refused."""


def refuse_pipeline(pipe: DiffusionPipeline) -> None:
    """Refuse a pipeline in which experts could not run as they were distilled to.

    Args:
        pipe: The pipeline.

    Raises:
        ExpertsError: If it is one; the line says why.
    """
    if (reason := reason_against(pipe)) is not None:
        raise ExpertsError(f"a {type(pipe).__name__} takes no phased experts: {reason}")


def reason_against(pipe: DiffusionPipeline) -> str | None:
    """Tell why phased experts cannot run in a pipeline.

    Args:
        pipe: The pipeline.

    Returns:
        The reason; None where they can run.
    """
    if (known := REASONS.get(type(pipe).__name__)) is not None:
        return known
    if inner := [name for name, value in vars(pipe).items() if isinstance(value, DiffusionPipeline)]:
        return f"it is made of pipelines that hold the network each: attach them to pipe.{inner[0]}"
    if hasattr(pipe, "set_pag_applied_layers"):
        return "perturbed attention guides with a second network, which the experts were not distilled for"
    network = network_of(pipe, COMPONENT)
    if network is not None and not set(TIMESTEPS) & set(inspect.signature(type(network).forward).parameters):
        return f"its {type(network).__name__} is not called with a timestep, by which experts are checked"
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        return "it has no scheduler"
    if not is_flow(scheduler):
        return (
            f"its {type(scheduler).__name__} does not step along a rectified flow, x = (1 - sigma) x_0 + sigma noise, "
            "which is what experts are distilled for"
        )
    if scheduler.config.get("invert_sigmas"):
        return "its sigmas run from 0 for noise to 1 (invert_sigmas)"
    return None


def refuse_shared_layers(pipe: DiffusionPipeline) -> None:
    """Refuse full experts in a pipeline where another component is made of layers of the network.

    Args:
        pipe: The pipeline.

    Raises:
        ExpertsError: If it is one: the component would stay with the base's layers.
    """
    own = {id(parameter) for parameter in network_of(pipe, COMPONENT).parameters()}
    for name, component in pipe.components.items():
        if name != COMPONENT and isinstance(component, nn.Module) and own & {id(p) for p in component.parameters()}:
            raise ExpertsError(
                f"the {name} of a {type(pipe).__name__} shares layers with its {COMPONENT}, which full experts "
                "replace: convert the experts to LoRA"
            )


def nothing_carried(pipe: DiffusionPipeline, given: Mapping[str, Any]) -> dict[str, Any]:
    """Choose arguments of a call with which nothing that one expert computed is used by the next.

    Args:
        pipe: A phased pipeline.
        given: The arguments that the caller gave, by name.

    Returns:
        Further arguments.

    Raises:
        ExpertsError: If the caller asks for what hands keys and values of the first expert to the others.
    """
    if type(pipe).__name__ == "GlmImagePipeline" and given.get("image") is not None:
        raise ExpertsError(
            "a GlmImagePipeline keeps the first expert's keys and values of a picture for all others: phased experts "
            "take no picture there"
        )
    if "use_kv_cache" not in inspect.signature(type(pipe).__call__).parameters:
        return {}
    if given.get("use_kv_cache"):
        raise ExpertsError("use_kv_cache=True keeps the first expert's keys and values for all others: leave it out")
    return {"use_kv_cache": False}


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Tell whether a scheduler steps along a rectified flow.

    Args:
        scheduler: A scheduler of a pipeline.

    Returns:
        Whether it does, as far as class and configuration say.
    """
    if isinstance(scheduler, PhasedDMDScheduler):
        return True
    kind, config = type(scheduler).__name__, scheduler.config
    flows = kind.startswith("FlowMatch") or kind == "LTXEulerAncestralRFScheduler"
    return flows or config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas") is True

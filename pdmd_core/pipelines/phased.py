"""The class of a phased pipeline: made on the fly from the pipeline's own, so that everything else about it stays."""

from __future__ import annotations

import functools
import inspect
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import nn

from ..experts import MANIFEST_NAME, ExpertsError, PhasedExperts
from ..phases import PhasePlan
from ..scheduler import PhasedDMDScheduler
from .networks import COMPONENT, component_names
from .routing import Route

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

logger = logging.get_logger(__name__)

STOCK_SCHEDULER = ("diffusers", "FlowMatchEulerDiscreteScheduler")
"""Written into model_index.json: ``from_pretrained`` cannot load a scheduler of a third package by its index."""


@dataclass
class Original:
    """A pipeline as it was: class, configuration, and the components that experts replaced (None where not loaded)."""

    kind: type[DiffusionPipeline]
    config: Any
    components: dict[str, Any]


@dataclass
class Attachment:
    """What a phased pipeline carries as ``pipe.phased``."""

    plan: PhasePlan
    guidance_scale: float
    route: Route
    original: Original
    experts: PhasedExperts | None
    """None for a pipeline loaded from a stock folder of full experts."""
    networks: tuple[nn.Module, ...]
    """Full experts in the order of the phases; empty for LoRA experts."""
    handles: list[RemovableHandle]
    running: bool = False
    """Inside a call, when ``pipe.transformer`` is the full expert on turn."""


@functools.cache
def phased_class(base: type[DiffusionPipeline], networks: int = 0) -> type[DiffusionPipeline]:
    """A subclass of a pipeline class that samples with phased experts.

    networks: number of full experts, which become its components; 0 for LoRA experts.
    """
    signature = inspect.signature(base.__call__)

    @functools.wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        attachment: Attachment = self.phased
        if not isinstance(self.scheduler, PhasedDMDScheduler) or self.scheduler.plan != attachment.plan:
            raise ExpertsError(
                f"phased experts walk the sigmas of their own plan, the pipeline's scheduler is a "
                f"{type(self.scheduler).__name__}: set pipe.scheduler = PhasedDMDScheduler.from_plan(pipe.phased.plan)"
            )
        attachment.route.scheduler = self.scheduler
        kwargs |= _defaults(self, signature, signature.bind_partial(self, *args, **kwargs).arguments)
        attachment.running = True
        try:
            return base.__call__(self, *args, **kwargs)
        finally:
            attachment.running = False

    def save_pretrained(self: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        hub = {name: kwargs.pop(name) for name in ("repo_id", "private", "token", "commit_message") if name in kwargs}
        push = kwargs.pop("push_to_hub", False)
        folder, attachment = Path(save_directory), self.phased
        if networks:
            base.save_pretrained(self, folder, *args, **kwargs)
        else:  # the base without adapters, the experts' own files beside it
            from .attach import attach_experts, detach_experts

            experts, scheduler = attachment.experts, self.scheduler
            detach_experts(self)
            try:
                self.save_pretrained(folder, *args, **kwargs)
            finally:
                attach_experts(self, experts)
                self.scheduler = scheduler
            for name in (MANIFEST_NAME, *(expert.file for expert in experts.manifest.experts)):
                shutil.copyfile(experts.folder / name, folder / name)
        if push:
            return self.push_to_hub(hub.pop("repo_id", folder.name), **hub)
        return None

    namespace = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__call__": __call__,
        "save_pretrained": save_pretrained,
    }
    if networks:
        namespace |= _components_of_full_experts(base, networks)
    return type(f"Phased{base.__name__}", (base,), namespace)


def _defaults(pipe: Any, signature: inspect.Signature, given: Mapping[str, Any]) -> dict[str, Any]:
    """Steps and guidance of the experts, where the caller said nothing; a warning where guidance is asked for."""
    attachment: Attachment = pipe.phased
    known = signature.parameters
    defaults: dict[str, Any] = {}
    if "num_inference_steps" in known and not {"num_inference_steps", "sigmas", "timesteps"} & set(given):
        defaults["num_inference_steps"] = len(attachment.plan.sigmas)
    # beside true_cfg_scale, guidance_scale is an input of a guidance-distilled base and stays as it is
    name = next((name for name in ("true_cfg_scale", "guidance_scale") if name in known), None)
    if name is None:
        return defaults
    none = _no_guidance(pipe) if name == "guidance_scale" else 1.0
    wanted = attachment.guidance_scale - 1.0 + none
    if name not in given:
        defaults[name] = wanted
    elif float(given[name]) > max(wanted, none):
        logger.warning(
            f"{name}={given[name]}: these experts were distilled with the teacher's guidance in them. Guidance on top "
            f"applies it twice and doubles the work; leave it at {wanted:g}."
        )
    return defaults


def _no_guidance(pipe: Any) -> float:
    """The guidance_scale at which a pipeline uses none: 1, or 0 where it counts what is added (Z-Image)."""
    before = pipe.__dict__.get("_guidance_scale")
    pipe._guidance_scale = 1.0
    try:
        return 0.0 if getattr(pipe, "do_classifier_free_guidance", False) is True else 1.0
    finally:
        pipe._guidance_scale = before


def _components_of_full_experts(base: type[DiffusionPipeline], networks: int) -> dict[str, Any]:
    names = component_names(networks)
    signature = inspect.signature(base.__init__)
    annotation = signature.parameters[COMPONENT].annotation
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name in names[1:]
        if name not in signature.parameters
    ]

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        more = {parameter.name: kwargs.pop(parameter.name, None) for parameter in extra}
        base.__init__(self, *args, **kwargs)
        self.register_modules(**more)

    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *extra])  # type: ignore[attr-defined]

    def on_turn(self: Any) -> Any:
        attachment = self.__dict__.get("phased")
        running = attachment is not None and attachment.running
        return self.__dict__.get(names[attachment.route.scheduler.phase] if running else COMPONENT)

    def replace(self: Any, network: Any) -> None:
        self.__dict__[COMPONENT] = network

    def maybe_free_model_hooks(self: Any) -> None:
        if "phased" in self.__dict__:
            self.phased.running = False  # every component by its own name again
        base.maybe_free_model_hooks(self)

    def save_config(self: Any, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        base.save_config(self, save_directory, push_to_hub=push_to_hub, **kwargs)
        path = Path(save_directory) / self.config_name
        index = json.loads(path.read_text(encoding="utf-8"))
        index |= {"_class_name": base.__name__, "scheduler": list(STOCK_SCHEDULER)}
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    sequence = base.model_cpu_offload_seq
    if sequence is not None and len(names) > 1:
        parts = [part for part in sequence.split("->") if part not in names[1:]]
        at = parts.index(COMPONENT) + 1
        sequence = "->".join([*parts[:at], *names[1:], *parts[at:]])
    return {
        "__init__": __init__,
        COMPONENT: property(on_turn, replace),
        "maybe_free_model_hooks": maybe_free_model_hooks,
        "save_config": save_config,
        "model_cpu_offload_seq": sequence,
        "_optional_components": [*base._optional_components, *(parameter.name for parameter in extra)],
    }

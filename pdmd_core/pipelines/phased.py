"""The class of a phased pipeline: made on the fly from the pipeline's own, so that everything else about it stays."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, get_type_hints

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from ..experts import ExpertsError
from ..experts.format.files import GUIDANCE, SCHEDULER_ENTRY
from ..scheduler import PhasedDMDScheduler
from .adapters import without_adapters
from .attachment import MISSING, Attachment, Original
from .guidance import guidances_of
from .networks import COMPONENT, component_names
from .offload import offload_groups
from .refusals import nothing_carried

logger = logging.get_logger(f"diffusers.{__name__}")

BASE_SCHEDULER = "base_scheduler"
"""The folder of the base's own scheduler in a saved pipeline with LoRA experts."""

TO_HUB = ("repo_id", "commit_message", "private", "token", "create_pr")
"""Arguments of ``save_pretrained`` for ``push_to_hub``."""

LOADER = "pdmd_core.load_phased_pipeline(folder)"
"""What loads a saved pipeline whose experts a stock pipeline does not switch."""


class PhasedPipeline(Protocol):
    """A pipeline of diffusers with phased experts, as type checkers see it."""

    phased: Attachment
    """The experts and their plan."""
    scheduler: PhasedDMDScheduler
    """Walks the plan."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sample, with the arguments of the pipeline's own class.

        Args:
            *args: Positional arguments.
            **kwargs: Keyword arguments.

        Returns:
            What the pipeline's own class returns.
        """

    def __getattr__(self, name: str) -> Any:
        """Look up whatever else the pipeline's own class has.

        Args:
            name: The name of the attribute.

        Returns:
            The attribute.
        """


@functools.cache
def phased_class(base: type[DiffusionPipeline], networks: int = 0) -> type[DiffusionPipeline]:
    """Make a subclass of a pipeline class that samples with phased experts.

    It keeps the name of its base, by which diffusers looks up related pipelines.

    Args:
        base: The pipeline's own class.
        networks: The number of full experts, which become components of the pipeline; 0 for LoRA experts.

    Returns:
        The subclass.
    """
    signature = inspect.signature(base.__call__)

    @functools.wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        attachment = _attachment(self)
        given = signature.bind_partial(self, *args, **kwargs).arguments
        with attachment.lock:
            attachment.check(self, given)
            kwargs |= _defaults(self, signature, given) | nothing_carried(self, given)
            if (steps := given.get("num_inference_steps")) is not None:
                self.scheduler.check_steps(steps)
            asked = any(given.get(name) is not None for name in ("sigmas", "timesteps"))
            outer, attachment.running = attachment.running, True
            try:
                with attachment.route.call(self.scheduler), nullcontext() if asked else self.scheduler.counting_only():
                    return base.__call__(self, *args, **kwargs)
            finally:
                attachment.running = outer
                if not outer:
                    for switch in attachment.switches.values():
                        switch.differences.rest()

    def maybe_free_model_hooks(self: Any) -> None:
        if "phased" in self.__dict__:
            self.phased.running = False  # every component by its own name again
        base.maybe_free_model_hooks(self)

    def get_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = base.get_timesteps(self, *args, **kwargs)
        steps = len(self.scheduler.timesteps)
        if steps and not len(found[0]):
            raise ExpertsError(f"this strength leaves none of the {steps} steps: ask for at least {1 / steps:.3g}")
        if self.scheduler.begin_index is None:  # not every pipeline says that it starts midway
            self.scheduler.set_begin_index(steps - len(found[0]))
        return found

    def save_pretrained(self: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        attachment, folder = _attachment(self), Path(save_directory)
        if kwargs.pop("push_to_hub", False):
            given = {name: kwargs[name] for name in TO_HUB if name in kwargs}
            self.save_pretrained(folder, *args, **{name: value for name, value in kwargs.items() if name not in given})
            self.push_to_hub(given.pop("repo_id", folder.name), **given)  # once all is as it has to be
            return
        if networks:
            base.save_pretrained(self, str(folder), *args, **kwargs)
            _save_scheduler(self.scheduler, folder, None if _switches_itself(self, base, networks) else LOADER)
            return
        folder.mkdir(parents=True, exist_ok=True)
        if (experts := attachment.experts) is not None:
            experts.save_pretrained(folder)
        scheduler = self.scheduler
        with _as_it_was(self):  # the base without adapters; the experts are in their own files
            self.save_pretrained(str(folder), *args, **kwargs)
            self.scheduler.save_pretrained(folder / BASE_SCHEDULER)
        _save_scheduler(scheduler, folder, LOADER)

    def __reduce_ex__(self: Any, protocol: object) -> tuple[Any, ...]:
        return _of_class, (base, networks), self.__dict__

    namespace: dict[str, Any] = {
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": f"Phased{base.__qualname__}",
        "__doc__": base.__doc__,
        "__call__": __call__,
        "maybe_free_model_hooks": maybe_free_model_hooks,
        "enable_group_offload": offload_groups,
        "save_pretrained": save_pretrained,
    }
    if hasattr(base, "get_timesteps"):
        namespace["get_timesteps"] = get_timesteps
    known = inspect.signature(base.__init__).parameters
    namespace |= {name: _component(name) for name in component_names(2) if name == COMPONENT or name in known}
    if networks:
        namespace |= _components_of_full_experts(base, component_names(networks))
    return type(base.__name__, (base,), namespace)


def _of_class(base: type[DiffusionPipeline], networks: int) -> Any:
    """An empty pipeline for ``pickle`` and ``copy``, which find no class that is made on the fly."""
    kind: Any = phased_class(base, networks)  # type: ignore[arg-type]  # a class is hashable
    return kind.__new__(kind)


def _save_scheduler(scheduler: PhasedDMDScheduler, folder: Path, needs_switching: str | None) -> None:
    """Write the scheduler, and its entry in model_index.json, for a pipeline that may not switch experts by itself."""
    copy = PhasedDMDScheduler.from_config(scheduler.config, needs_switching=needs_switching)
    copy.save_pretrained(folder / "scheduler")
    path = folder / DiffusionPipeline.config_name
    index = json.loads(path.read_text(encoding="utf-8")) | {"scheduler": SCHEDULER_ENTRY}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _switches_itself(pipe: Any, base: type[DiffusionPipeline], networks: int) -> bool:
    """Whether the stock pipeline runs each full expert in its phase: one, or two where it has a boundary."""
    second = component_names(2)[1]
    two = networks == 2 and second in inspect.signature(base.__init__).parameters
    return networks == 1 or (two and pipe.config.get("boundary_ratio") is not None)


def _attachment(pipe: Any) -> Attachment:
    """What a phased pipeline carries; a pipeline that was made from a phased one carries nothing."""
    if "phased" not in pipe.__dict__:
        raise ExpertsError(
            "this pipeline was made from a phased one: call attach_experts(this_pipeline, that_pipeline)"
        )
    attachment: Attachment = pipe.phased
    return attachment


def _component(name: str) -> property:
    """A property that is the expert of the current phase within a call, and the plain component otherwise."""

    def get(self: Any) -> Any:
        attachment = self.__dict__.get("phased")
        if attachment is not None and attachment.running:
            return attachment.on_turn(name, self.__dict__)
        return self.__dict__.get(name)

    def replace(self: Any, network: Any) -> None:
        self.__dict__[name] = network

    return property(get, replace)


@contextmanager
def _as_it_was(pipe: Any) -> Iterator[None]:
    """The pipeline with LoRA experts as the one they were attached to; adapters are left out of weights."""
    attachment, kind, config = pipe.phased, type(pipe), pipe._internal_dict
    now = {name: pipe.__dict__[name] for name in attachment.original.components}
    for switch in attachment.switches.values():
        switch.differences.switch(None)
    hooks = [s.network.register_state_dict_post_hook(without_adapters) for s in attachment.switches.values()]
    restore(pipe, attachment.original)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        pipe.__class__ = kind
        pipe.__dict__ |= {"phased": attachment, "_internal_dict": config, **now}


def restore(pipe: Any, original: Original) -> None:
    """Restore class, configuration and components of a pipeline.

    Args:
        pipe: A phased pipeline.
        original: What it was before.
    """
    del pipe.__dict__["phased"]
    pipe.__class__ = original.kind
    pipe._internal_dict = original.config
    for name, component in original.components.items():
        if component is MISSING:
            pipe.__dict__.pop(name, None)
        else:
            pipe.__dict__[name] = component


def _defaults(pipe: Any, signature: inspect.Signature, given: Mapping[str, Any]) -> dict[str, Any]:
    """Steps and guidance of the experts, where the caller said nothing; a warning where guidance is asked for."""
    attachment: Attachment = pipe.phased
    known = signature.parameters
    defaults: dict[str, Any] = {}
    if not {"sigmas", "timesteps"} & set(given):
        steps = given.get("num_inference_steps") or len(attachment.plan.sigmas)
        if "num_inference_steps" in known and "num_inference_steps" not in given:
            defaults["num_inference_steps"] = steps
        if "sigmas" in known and ("num_inference_steps" not in known or pipe.config.get("sample_sigmas")):
            defaults["sigmas"] = torch.linspace(1, 1 / steps, steps).tolist()  # only their number counts
    for guidance in guidances_of(pipe):
        name, wanted = guidance.argument, guidance.of(attachment.guidance_scale)
        if name not in given:
            defaults[name] = wanted
        elif given[name] is not None and float(given[name]) > max(wanted, guidance.none):
            logger.warning(
                f"{name}={given[name]}: these experts were distilled with the teacher's guidance in them. Guidance on "
                f"top applies it twice and doubles the work; leave it at {wanted:g}."
            )
    if "guidance_schedule" in known and "guidance_schedule" not in given and "guidance_scale" in defaults:
        defaults["guidance_schedule"] = None  # it excludes a scale
    return defaults


def _components_of_full_experts(base: type[DiffusionPipeline], names: list[str]) -> dict[str, Any]:
    signature, hints = inspect.signature(base.__init__), get_type_hints(base.__init__)
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

    # diffusers looks at both, to load components and to hand them to other pipelines
    __init__.__annotations__ = hints | {parameter.name: hints.get(COMPONENT, annotation) for parameter in extra}
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *extra])  # type: ignore[attr-defined]

    def save_config(self: Any, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        base.save_config(self, save_directory, push_to_hub=push_to_hub, **kwargs)
        path = Path(save_directory) / self.config_name
        index = json.loads(path.read_text(encoding="utf-8"))
        index |= {"scheduler": SCHEDULER_ENTRY, GUIDANCE: _attachment(self).guidance_scale}
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    sequence = base.model_cpu_offload_seq
    if sequence is not None and len(names) > 1:
        parts = [part for part in sequence.split("->") if part not in names[1:]]
        at = parts.index(COMPONENT) + 1
        sequence = "->".join([*parts[:at], *names[1:], *parts[at:]])
    return {
        "__init__": __init__,
        "save_config": save_config,
        "model_cpu_offload_seq": sequence,
        "_optional_components": [*base._optional_components, *(parameter.name for parameter in extra)],
    }

"""Phased experts in a pipeline that is there already, and out again."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import nn

from ..experts import BaseModel, ExpertsError, Manifest, PhasedExperts
from ..experts.format.fingerprint import base_warning, network_weights, sampler_of
from ..experts.format.untrusted import shown
from ..families import known_family, lora_family
from ..phases import PhasePlan
from ..scheduler import PhasedDMDScheduler
from .adapters import load_adapters, remove_adapters
from .attachment import MISSING, Attachment, Original
from .guidance import guiders_of
from .merging import Merge
from .networks import (
    COMPONENT,
    component_names,
    empty_like,
    full_networks,
    network_of,
)
from .offload import disk_files, is_offloaded_in_parts, offloaded_again
from .phased import PhasedPipeline, phased_class, restore
from .refusals import refuse_pipeline, refuse_shared_layers
from .routing import Route, guard_networks
from .settings import give_settings

logger = logging.get_logger(f"diffusers.{__name__}")


def attach_experts(
    pipe: DiffusionPipeline,
    experts: str | Path | PhasedExperts | DiffusionPipeline,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
    merge: Merge = False,
) -> PhasedPipeline:
    """Make a pipeline sample with phased experts.

    The pipeline is changed in place. Its steps and guidance default to what the experts were distilled for, and
    adapters of the user's own stay. A warning is logged when the base has other weights than the one that LoRA experts
    were distilled from.

    Args:
        pipe: A pipeline whose network is of the experts' architecture.
        experts: An experts folder, a Hub id, opened experts, or another phased pipeline whose experts are then shared
            (with a pipeline that was made from it by ``from_pipe``, for example).
        revision: A branch, tag or commit hash of experts on the Hub.
        token: The token for private repositories; None takes the one of ``hf auth login`` or HF_TOKEN.
        cache_dir: Where downloads are kept; None is the Hub client's own cache.
        local_files_only: Whether only the cache is used, as with HF_HUB_OFFLINE=1.
        subfolder: The folder in which the experts lie, below the one or the repository that is given.
        merge: Whether LoRA experts are merged into the network's weights as they take their turns, instead of computed
            beside them: True in place, "copies" with weights of every phase that stay on the device. After each call
            the weights are those of the base, bit for bit. Full experts are as they are.

    Returns:
        The same pipeline.

    Raises:
        ExpertsError: If experts and pipeline do not fit. The pipeline is then as it was.

    Examples:
        >>> from diffusers import DiffusionPipeline
        >>> pipe = DiffusionPipeline.from_pretrained("training/embedded/models/teacher")
        >>> pipe = attach_experts(pipe, "training/embedded/models/experts")
        >>> [phase.name for phase in pipe.phased.plan.phases]
        ['high_noise', 'low_noise']
        >>> type(detach_experts(pipe).scheduler).__name__  # as it was
        'UniPCMultistepScheduler'
    """
    if isinstance(getattr(pipe, "phased", None), Attachment):
        raise ExpertsError("this pipeline already has phased experts: call detach_experts first")
    if merge not in (False, True, "copies"):
        raise ExpertsError(f"merge= is True, False or 'copies', found {merge!r}")
    if isinstance(experts, DiffusionPipeline):
        if merge:
            raise ExpertsError("merge= is decided where experts are loaded: leave it out when they are shared")
        return _share(pipe, experts)
    if not isinstance(experts, PhasedExperts):
        experts = PhasedExperts.from_pretrained(experts, revision, cache_dir, token, local_files_only, subfolder)
    return attach_opened(pipe, experts, merge=merge)


def detach_experts(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Take the experts out of a pipeline, which is then as it was before ``attach_experts``.

    Args:
        pipe: A phased pipeline.

    Returns:
        The same pipeline.

    Raises:
        ExpertsError: If the pipeline has no experts, or was loaded without the base's own network.
    """
    attachment = getattr(pipe, "phased", None)
    if not isinstance(attachment, Attachment):
        raise ExpertsError("this pipeline has no phased experts to detach")
    original = attachment.original
    if original is None or original.components.get(COMPONENT, MISSING) is None:
        raise ExpertsError("this pipeline was loaded without its base network: load the base itself")
    if attachment.handles:
        attachment.route.attached = False
        for handle in attachment.handles:
            handle.remove()
        for switch in attachment.switches.values():
            switch.differences.switch(None)
            remove_adapters(switch.network)
    with offloaded_again(pipe):
        restore(pipe, original)
        experts = attachment.networks or [switch.network for switch in attachment.switches.values()]
        for network in original.components.values():
            if isinstance(network, nn.Module) and network not in experts and not is_offloaded_in_parts(network):
                _follow(network, experts[0])
    return pipe


def _follow(network: Any, expert: Any) -> None:
    """Move a network that was put aside to the device and dtype of the expert that stood in for it."""
    network.to(expert.device)
    if network.dtype != expert.dtype:
        network.to(expert.dtype)


def attach_opened(
    pipe: DiffusionPipeline,
    experts: PhasedExperts,
    loaded: Sequence[nn.Module] | None = None,
    scheduler: PhasedDMDScheduler | None = None,
    merge: Merge = False,
) -> PhasedPipeline:
    """Attach opened experts.

    Args:
        pipe: The pipeline.
        experts: The experts.
        loaded: Full experts that the pipeline was loaded with in the base's place.
        scheduler: A scheduler that walks the experts' plan; None takes the pipeline's own where it does, or a new one.
        merge: Whether LoRA experts are merged, as ``attach_experts`` says.

    Returns:
        The same pipeline.

    Raises:
        ExpertsError: If experts and pipeline do not fit. The pipeline is then as it was.
    """
    network = network_of(pipe, COMPONENT)
    experts = experts.on_network(type(network).__name__) if network is not None else experts
    manifest = experts.manifest
    _check_fits(pipe, experts)
    scheduler = scheduler or _scheduler_of(pipe, manifest.plan)
    attachment = Attachment(manifest.plan, manifest.guidance_scale, Route(scheduler), experts, merge=merge)
    if kind_of(manifest) == "lora":
        switches = load_adapters(pipe, experts, attachment.route, merge)
        for component in switches:
            _warn_of_other_weights(pipe, component, manifest.base)
        if len(switches) == 1:  # adapters of one network take all noise on it: it stands first, whichever it was
            switches = {COMPONENT: switches.popitem()[1]}
        attachment.switches = switches
        attachment.handles = [
            switch.network.register_forward_pre_hook(switch, with_kwargs=True)
            for switch in attachment.switches.values()
        ]
    else:
        refuse_shared_layers(pipe)
        networks = loaded
        if networks is None:
            like = network_of(pipe, COMPONENT)
            if is_offloaded_in_parts(like):
                raise ExpertsError("this pipeline is offloaded in parts: attach full experts first, then offload")
            if pipe.transformer is not like or any(module._compiled_call_impl for module in like.modules()):
                logger.warning(
                    "the compiled network of this pipeline gives way to full experts: compile them too, with "
                    "`for network in pipe.phased.networks: network.compile()`"
                )
            quantizer = getattr(like, "hf_quantizer", None)
            networks = full_networks(
                experts,
                lambda component: empty_like(network_of(pipe, component)),
                like.dtype,
                None if quantizer is None else quantizer.quantization_config,
            )
            networks = [network if network.device == like.device else network.to(like.device) for network in networks]
            give_settings(like, networks)
        attachment.networks = tuple(networks)
        attachment.handles = guard_networks(networks, attachment.route)
    _install(pipe, attachment, scheduler)
    if loaded is not None and attachment.original is not None:
        attachment.original.components[COMPONENT] = None
    return cast(PhasedPipeline, pipe)


def _share(pipe: DiffusionPipeline, owner: DiffusionPipeline) -> PhasedPipeline:
    """Share the experts of another pipeline: full ones always, LoRA ones where the network is the same."""
    shared = getattr(owner, "phased", None)
    if not isinstance(shared, Attachment):
        raise ExpertsError("the pipeline given as experts has none: pass an experts folder, a Hub id or a phased one")
    if not shared.route.attached:
        raise ExpertsError("the pipeline given as experts has lost them to detach_experts: attach them to it again")
    refuse_pipeline(pipe)
    if shared.networks:
        refuse_shared_layers(pipe)
        if type(network_of(pipe, COMPONENT)) is not type(shared.networks[0]):
            raise ExpertsError(
                f"the experts to share are of a {type(shared.networks[0]).__name__}, the pipeline has a "
                f"{type(network_of(pipe, COMPONENT)).__name__}"
            )
    else:
        own = [network_of(pipe, name) for name in component_names(2)]
        if not all(switch.network in own for switch in shared.switches.values()):
            assert shared.experts is not None  # LoRA experts come from a folder
            return attach_opened(pipe, shared.experts, merge=shared.merge)
    attachment = Attachment(
        shared.plan,
        shared.guidance_scale,
        shared.route,
        shared.experts,
        shared.networks,
        shared.switches,
        merge=shared.merge,
    )
    scheduler = _scheduler_of(pipe, shared.plan)
    if scheduler is owner.scheduler:  # as from_pipe has it; two calls at a time need one each
        scheduler = PhasedDMDScheduler.from_config(scheduler.config)
    _install(pipe, attachment, scheduler)
    return cast(PhasedPipeline, pipe)


def _scheduler_of(pipe: DiffusionPipeline, plan: PhasePlan) -> PhasedDMDScheduler:
    """The pipeline's own scheduler where it walks this plan already (with options of the user's), or a new one."""
    own = isinstance(pipe.scheduler, PhasedDMDScheduler) and pipe.scheduler.plan == plan
    scheduler: PhasedDMDScheduler = pipe.scheduler if own else PhasedDMDScheduler.from_plan(plan)
    return scheduler


def _install(pipe: DiffusionPipeline, attachment: Attachment, scheduler: PhasedDMDScheduler) -> None:
    """Set class, components and configuration of a phased pipeline."""
    original = Original(type(pipe), pipe._internal_dict, {"scheduler": pipe.scheduler})
    networks, routing = attachment.networks, _routing(pipe, attachment)
    with offloaded_again(pipe):
        experts = networks or [switch.network for switch in attachment.switches.values()]
        names = component_names(len(experts)) if networks else []
        if len(experts) == 1 and getattr(pipe, component_names(2)[1], None) is not None:
            names = component_names(2)  # one network for all noise: the base's other one has no turn
        for name, network in zip(names, [*experts, None], strict=False):
            original.components[name] = pipe.__dict__.get(name, MISSING)
            pipe.register_modules(**{name: network})
        pipe.register_to_config(**routing)
        for name, guider in guiders_of(pipe, attachment.guidance_scale).items():
            original.components[name] = pipe.__dict__[name]
            pipe.register_modules(**{name: guider})
        pipe.register_modules(scheduler=scheduler)
        attachment.original = original
        pipe.__dict__["phased"] = attachment
        pipe.__class__ = phased_class(original.kind, len(networks))  # type: ignore[arg-type]  # a class is hashable


def _routing(pipe: DiffusionPipeline, attachment: Attachment) -> dict[str, Any]:
    """Entries of the pipeline's configuration with which its call asks for a second network where the plan has one."""
    plan, second = attachment.plan, component_names(2)[1]
    holds_two = second in inspect.signature(type(pipe).__init__).parameters
    components = [COMPONENT] * len(plan)
    if len(attachment.networks) == 2 and holds_two:
        components = [COMPONENT, second]
    for name, switch in attachment.switches.items():
        for phase in switch.phases:
            components[phase] = name
    found = lora_family(type(network_of(pipe, COMPONENT)).__name__)
    routing = found.stock_routing(plan, components) if found else {}
    return {key: value for key, value in routing.items() if key in pipe.config}


def kind_of(manifest: Manifest) -> str:
    """Tell which kind all experts are of.

    Args:
        manifest: The experts' manifest.

    Returns:
        "lora" or "full".

    Raises:
        ExpertsError: If they are of both kinds.
    """
    kinds = {expert.kind for expert in manifest.experts}
    if len(kinds) > 1:
        raise ExpertsError("these experts are partly LoRA, partly full: convert them to one kind for a pipeline")
    return kinds.pop()


def _check_fits(pipe: DiffusionPipeline, experts: PhasedExperts) -> None:
    """Refuse experts of another architecture or of components that the pipeline does not have."""
    manifest, kind = experts.manifest, type(pipe).__name__
    network = network_of(pipe, COMPONENT)
    if network is None:
        raise ExpertsError(f"a {kind} without a {COMPONENT} cannot take phased experts")
    refuse_pipeline(pipe)
    family = lora_family(type(network).__name__)
    extended = family is not None and family.name == manifest.base.family and kind_of(manifest) == "lora"
    if type(network).__name__ != manifest.base.architecture and not extended:
        raise ExpertsError(
            f"these experts are of a {manifest.base.architecture} ({manifest.base.model}), the pipeline has a "
            f"{type(network).__name__}"
        )
    first, second = component_names(2)
    components = [expert.component for expert in manifest.experts]
    if not set(components) <= {first, second}:
        raise ExpertsError(f"experts of a pipeline belong to {first} or {second}, found {', '.join(components)}")
    has_two = network_of(pipe, second) is not None
    if components != sorted(components):
        raise ExpertsError(f"experts belong to {first}, then {second}, found {', '.join(components)}")
    theirs = (manifest.base.model, str(experts.folder))  # the second: a pipeline saved with its experts
    if has_two and len(set(components)) == 1 and str(pipe.config.get("_name_or_path")) not in theirs:
        logger.warning(
            f"these experts were distilled for one network, this {kind} has two: its {components[0]} with the experts "
            f"takes all steps, which is right for experts of one of its networks and wrong for those of another model; "
            f"they name {manifest.base.model!r} as theirs"
        )
    if has_two and known_family(manifest.base.architecture) is None:
        raise ExpertsError(
            f"when a {kind} runs which of its two networks is not known here, as {manifest.base.architecture} is of no "
            "model family of this project: experts can be attached to pipelines with one"
        )
    if not has_two and second in components:
        raise ExpertsError(f"these experts belong to two networks, this {kind} has one: use {manifest.base.model!r}")


def _warn_of_other_weights(pipe: DiffusionPipeline, component: str, origin: BaseModel) -> None:
    """Warn of a base with other weights: experts are put on fine-tunes on purpose, and by mistake."""
    network = network_of(pipe, component)
    if disk_files(network):
        return
    where = pipe.config.get("_name_or_path")
    found = f"the {component} of {shown(where) if where else 'this pipeline'}"
    if text := base_warning(origin, component, sampler_of(network_weights(network)), found):
        logger.warning(text)

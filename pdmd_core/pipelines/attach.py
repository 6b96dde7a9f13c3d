"""Loading phased experts into a pipeline, and taking them out again."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from ..experts import MANIFEST_NAME, ExpertsError, Manifest, PhasedExperts
from ..scheduler import PhasedDMDScheduler
from .adapters import load_adapters, remove_adapters
from .networks import (
    COMPONENT,
    component_names,
    empty_like,
    empty_network,
    full_networks,
    load_index,
    network_of,
    no_base,
)
from .phased import Attachment, Original, phased_class
from .routing import Route, guard_networks

_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
MISSING = object()
"""Marks a component that the pipeline did not have."""


def load_phased_pipeline(
    experts: str | Path | PhasedExperts, base: str | Path | None = None, **kwargs: Any
) -> DiffusionPipeline:
    """A pipeline that samples with phased experts, from an experts folder, a Hub id, or a saved phased pipeline.

    base:   model folder or Hub id; the manifest's by default.
    kwargs: go to ``DiffusionPipeline.from_pretrained`` of the base (``dtype``, ``device_map``, ``variant``, ...).

    Full experts take the place of the base's network, which is not loaded. Raises ExpertsError.
    """
    if not isinstance(experts, PhasedExperts):
        folder = Path(experts)
        if (folder / "model_index.json").is_file():
            if not (folder / MANIFEST_NAME).is_file():
                return _load_stock_folder(folder, **kwargs)
            base = base or folder
        return load_phased_pipeline(PhasedExperts.from_pretrained(experts), base, **kwargs)
    manifest = experts.manifest
    source = str(base if base is not None else manifest.base.model)
    if base is None and manifest.base.revision:
        kwargs.setdefault("revision", manifest.base.revision)
    networks = None
    if _kind(manifest) == "full":
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        empty = functools.partial(empty_network, manifest.base.architecture, source, hub)
        networks = full_networks(experts, empty, kwargs.get("dtype"))
        index = load_index(source, hub)
        taken = [name for name in (COMPONENT, f"{COMPONENT}_2") if isinstance(index.get(name), list)]
        kwargs |= dict(zip(taken, [*networks, None], strict=False))
    scheduler = PhasedDMDScheduler.from_plan(manifest.plan)
    try:
        pipe = DiffusionPipeline.from_pretrained(source, scheduler=scheduler, **kwargs)
    except OSError as error:
        raise no_base(source, error) from None
    return _attach(pipe, experts, networks, keep_base=networks is None)


def attach_experts(
    pipe: DiffusionPipeline, experts: str | Path | PhasedExperts | DiffusionPipeline
) -> DiffusionPipeline:
    """Make this pipeline sample with phased experts; it is changed in place and returned.

    experts: an experts folder, a Hub id, opened experts, or another phased pipeline whose full experts are then shared.

    Steps and guidance default to what the experts were distilled for. Adapters of the user's own stay. Raises
    ExpertsError when experts and pipeline do not fit; the pipeline is then as it was.
    """
    if isinstance(getattr(pipe, "phased", None), Attachment):
        raise ExpertsError("this pipeline already has phased experts: call detach_experts first")
    if isinstance(experts, DiffusionPipeline):
        shared = getattr(experts, "phased", None)
        if not isinstance(shared, Attachment) or shared.experts is None:
            raise ExpertsError("the pipeline given as experts has none: pass an experts folder or Hub id")
        if shared.networks:
            return _attach(pipe, shared.experts, shared.networks, shared.route)
        experts = shared.experts
    return _attach(pipe, experts if isinstance(experts, PhasedExperts) else PhasedExperts.from_pretrained(experts))


def detach_experts(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Give the pipeline back as it was before ``attach_experts``. Raises ExpertsError where that cannot be."""
    attachment = getattr(pipe, "phased", None)
    if not isinstance(attachment, Attachment):
        raise ExpertsError("this pipeline has no phased experts to detach")
    original = attachment.original
    if original.components.get(COMPONENT, MISSING) is None:
        raise ExpertsError("this pipeline was loaded without its base network: load the base itself")
    for handle in attachment.handles:
        handle.remove()
    if not attachment.networks:
        for name in (COMPONENT, f"{COMPONENT}_2"):
            remove_adapters(network_of(pipe, name))
    del pipe.__dict__["phased"]
    pipe.__class__ = original.kind
    pipe._internal_dict = original.config
    for name, component in original.components.items():
        if component is MISSING:
            pipe.__dict__.pop(name, None)
        else:
            pipe.__dict__[name] = component
    return pipe


def _attach(
    pipe: DiffusionPipeline,
    experts: PhasedExperts,
    networks: Sequence[nn.Module] | None = None,
    route: Route | None = None,
    keep_base: bool = True,
) -> DiffusionPipeline:
    """networks, route: full experts that are loaded already, and the route their guards look at."""
    manifest = experts.manifest
    _check_fits(pipe, manifest)
    scheduler = pipe.scheduler
    if not isinstance(scheduler, PhasedDMDScheduler) or scheduler.plan != manifest.plan:
        scheduler = PhasedDMDScheduler.from_plan(manifest.plan)
    original = Original(type(pipe), pipe._internal_dict, {"scheduler": pipe.scheduler})
    route_or_new = route or Route(scheduler)
    if _kind(manifest) == "lora":
        handles, networks = load_adapters(pipe, experts, route_or_new), ()
        later = [
            phase
            for phase, expert in zip(manifest.plan.phases, manifest.experts, strict=True)
            if expert.component != COMPONENT
        ]
        second = later[0].sigmas[0] if later else None
    else:
        like = network_of(pipe, COMPONENT)
        if networks is None:
            networks = full_networks(experts, lambda component: empty_like(network_of(pipe, component)), like.dtype)
            networks = [network.to(like.device) for network in networks]
        handles = [] if route else guard_networks(networks, route_or_new)
        names = component_names(len(networks))
        if len(names) == 1 and getattr(pipe, f"{COMPONENT}_2", None) is not None:
            names.append(f"{COMPONENT}_2")  # one expert for all noise: the base's second network has no turn
        for name, network in zip(names, [*networks, None], strict=False):
            original.components[name] = pipe.__dict__.get(name, MISSING)
            pipe.register_modules(**{name: network})
        if not keep_base:
            original.components[COMPONENT] = None
        second = manifest.plan.boundaries[0] if len(networks) == 2 else None
    if "boundary_ratio" in pipe.config:
        # Wan's own rule is `timestep >= boundary_ratio * 1000` for its first network: strictly above the boundary
        pipe.register_to_config(boundary_ratio=second * 1.0005 if second is not None else None)
    pipe.register_modules(scheduler=scheduler)
    pipe.__dict__["phased"] = Attachment(
        manifest.plan, manifest.guidance_scale, route_or_new, original, experts, tuple(networks), handles
    )
    kind: type[DiffusionPipeline] = type(pipe)
    pipe.__class__ = phased_class(kind, len(networks))
    return pipe


def _kind(manifest: Manifest) -> str:
    kinds = {expert.kind for expert in manifest.experts}
    if len(kinds) > 1:
        raise ExpertsError("these experts are partly LoRA, partly full: convert them to one kind for a pipeline")
    return kinds.pop()


def _check_fits(pipe: DiffusionPipeline, manifest: Manifest) -> None:
    kind = type(pipe).__name__
    network, second = network_of(pipe, COMPONENT), network_of(pipe, f"{COMPONENT}_2")
    if network is None:
        raise ExpertsError(f"a {kind} without a {COMPONENT} cannot take phased experts")
    if type(network).__name__ != manifest.base.architecture:
        raise ExpertsError(
            f"these experts are of a {manifest.base.architecture} ({manifest.base.model}), the pipeline has a "
            f"{type(network).__name__}"
        )
    if _kind(manifest) == "full":
        return
    components = [expert.component for expert in manifest.experts]
    if components != sorted(components) or not set(components) <= {COMPONENT, f"{COMPONENT}_2"}:
        raise ExpertsError(f"LoRA experts belong to {COMPONENT}, then {COMPONENT}_2, found {', '.join(components)}")
    if second is None and len(set(components)) > 1:
        raise ExpertsError(f"these experts adapt two networks, this {kind} has one: use {manifest.base.model!r}")
    if second is not None and len(set(components)) == 1:
        raise ExpertsError(f"these experts adapt one network, this {kind} has two: use {manifest.base.model!r}")


def _load_stock_folder(folder: Path, **kwargs: Any) -> DiffusionPipeline:
    """A stock pipeline folder of full experts, as ``save_pretrained`` of a phased pipeline writes it."""
    import diffusers

    index = DiffusionPipeline.load_config(folder)
    scheduler = PhasedDMDScheduler.from_pretrained(folder, subfolder="scheduler")
    names = [name for name in component_names(99) if isinstance(index.get(name), list) and index[name][0]]
    if scheduler.plan is None or len(names) != len(scheduler.plan):
        found = f"a plan of {len(scheduler.plan)} phases" if scheduler.plan else "no phase plan in scheduler/"
        raise ExpertsError(f"{folder}: no {MANIFEST_NAME}, {len(names)} network(s) and {found}: not phased experts")
    kind = getattr(diffusers, index["_class_name"])
    pipe = phased_class(kind, len(names)).from_pretrained(folder, scheduler=scheduler, **kwargs)
    networks = tuple(network_of(pipe, name) for name in names)
    route = Route(scheduler)
    original = Original(kind, pipe._internal_dict, {COMPONENT: None})
    handles = guard_networks(networks, route)
    pipe.__dict__["phased"] = Attachment(scheduler.plan, 1.0, route, original, None, networks, handles)
    return pipe

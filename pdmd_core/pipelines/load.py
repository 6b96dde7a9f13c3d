"""Pipelines that are loaded with phased experts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ..experts import MANIFEST_NAME, ExpertsError, PhasedExperts
from ..experts.convert.released import UNKNOWN
from ..scheduler import PhasedDMDScheduler
from .attach import attach_opened, kind_of
from .networks import (
    COMPONENT,
    component_names,
    empty_network,
    full_networks,
    load_index,
    network_of,
    no_base,
    pipeline_class,
)
from .phased import GUIDANCE, SCHEDULER_FOLDER, Attachment, phased_class
from .routing import Route, guard_networks

_EXPERTS_ARGUMENTS = ("token", "cache_dir", "local_files_only")
_HUB_ARGUMENTS = (*_EXPERTS_ARGUMENTS, "revision", "force_download", "proxies")


def load_phased_pipeline(
    experts: str | Path | PhasedExperts,
    base: str | Path | None = None,
    experts_revision: str | None = None,
    **kwargs: Any,
) -> DiffusionPipeline:
    """Load a pipeline that samples with phased experts.

    Full experts take the place of the base's network, which is not loaded.

    Args:
        experts: An experts folder, a Hub id ``user/name``, opened experts, or a pipeline that was saved with its
            experts.
        base: The model folder or Hub id of the base; None takes the one that the manifest names.
        experts_revision: A branch, tag or commit of experts on the Hub.
        **kwargs: Arguments of ``DiffusionPipeline.from_pretrained`` for the base, such as ``dtype``, ``device_map``,
            ``variant`` and its ``revision``. ``token``, ``cache_dir`` and ``local_files_only`` serve for the experts
            too.

    Returns:
        A pipeline of the base's own class, whose steps and guidance default to what the experts were distilled for.

    Raises:
        ExpertsError: If the experts or the base cannot be loaded, or do not fit each other.

    Examples:
        >>> pipe = load_phased_pipeline("training/embedded/models/experts")
        >>> call = {"width": 32, "height": 32, "num_frames": 1, "max_sequence_length": 16}
        >>> pipe("a panda on a blue background", output_type="np", **call).frames.shape
        (1, 1, 32, 32, 3)
    """
    if isinstance(experts, PhasedExperts):
        return _load(experts, base, PhasedDMDScheduler.from_plan(experts.manifest.plan), **kwargs)
    folder = Path(experts)
    if (folder / "model_index.json").is_file():
        if not (folder / MANIFEST_NAME).is_file():
            return _load_stock(str(folder), **kwargs)
        saved = PhasedDMDScheduler.from_pretrained(folder, subfolder=SCHEDULER_FOLDER)
        return _load(PhasedExperts.open(folder), folder if base is None else base, saved, **kwargs)
    try:
        hub = {name: kwargs[name] for name in _EXPERTS_ARGUMENTS if name in kwargs}
        opened = PhasedExperts.from_pretrained(experts, revision=experts_revision, **hub)
    except ExpertsError:
        at = {} if experts_revision is None else {"revision": experts_revision}
        if folder.is_dir() or not _is_phased_index(str(experts), kwargs | at):
            raise
        return _load_stock(str(experts), **(kwargs | at))
    return load_phased_pipeline(opened, base, **kwargs)


def _load(
    experts: PhasedExperts, base: str | Path | None, scheduler: PhasedDMDScheduler, **kwargs: Any
) -> DiffusionPipeline:
    manifest, kind = experts.manifest, DiffusionPipeline
    if base is None and manifest.base.model == UNKNOWN:
        raise ExpertsError("these LoRA files do not tell their base: pass its Hub id or folder as base=")
    source = str(base if base is not None else manifest.base.model)
    if base is None and manifest.base.revision:
        kwargs.setdefault("revision", manifest.base.revision)
    networks = None
    if kind_of(manifest) == "full":
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        index = load_index(source, hub)
        taken = [name for name in component_names(2) if isinstance(index.get(name), list)]
        dtype, device = kwargs.get("dtype", kwargs.get("torch_dtype")), kwargs.get("device_map")
        if isinstance(dtype, dict):
            dtype = dtype.get(COMPONENT, dtype.get("default"))
        if device == "balanced":
            raise ExpertsError("device_map='balanced' cannot place full experts: use a device, or offloading")
        networks = full_networks(
            experts, functools.partial(empty_network, manifest.base.architecture, source, hub), dtype
        )
        networks = [network.to(device) for network in networks]
        kwargs |= dict(zip(taken, [*networks, None], strict=False))
        # DiffusionPipeline itself would load components that are optional in this class although they are given
        if "custom_pipeline" not in kwargs:
            kind = pipeline_class(source, index)
    try:
        pipe = kind.from_pretrained(source, **kwargs)
    except (OSError, ValueError) as error:
        raise no_base(source, error) from None
    return attach_opened(pipe, experts, networks, scheduler)


def _is_phased_index(source: str, kwargs: dict[str, Any]) -> bool:
    """Whether a Hub repository holds a saved pipeline of full experts."""
    try:
        return GUIDANCE in load_index(source, {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs})
    except ExpertsError:
        return False


def _load_stock(source: str, **kwargs: Any) -> DiffusionPipeline:
    """Load a stock pipeline of full experts, as ``save_pretrained`` of a phased pipeline writes it."""
    hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    index = load_index(source, hub)
    names = [name for name in component_names(99) if isinstance(index.get(name), list) and index[name][0]]
    scheduler = PhasedDMDScheduler.from_pretrained(source, subfolder="scheduler", **hub)
    kind = pipeline_class(source, index)
    if scheduler.plan is None or len(names) != len(scheduler.plan) or kind is DiffusionPipeline:
        found = f"a plan of {len(scheduler.plan)} phases" if scheduler.plan else "no phase plan in scheduler/"
        raise ExpertsError(f"{source}: no {MANIFEST_NAME}, {len(names)} network(s) and {found}: not phased experts")
    pipe = phased_class(kind, len(names)).from_pretrained(source, scheduler=scheduler, **kwargs)
    networks, route = tuple(network_of(pipe, name) for name in names), Route(scheduler)
    pipe.__dict__["phased"] = Attachment(
        scheduler.plan,
        float(index.get(GUIDANCE, 1.0)),
        route,
        None,
        networks,
        handles=guard_networks(networks, route),
    )
    return pipe

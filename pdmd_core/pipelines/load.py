"""Pipelines that are loaded with phased experts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..experts import MANIFEST_NAME, ExpertsError, PhasedExperts
from ..experts.convert.released import UNKNOWN
from ..experts.format.files import GUIDANCE, SCHEDULER_ENTRY
from ..families import known_family
from ..scheduler import PhasedDMDScheduler
from .attach import attach_opened, kind_of
from .attachment import Attachment
from .merging import Merge
from .networks import (
    COMPONENT,
    class_of,
    component_names,
    empty_network,
    full_networks,
    load_index,
    network_of,
    no_base,
    pipeline_class,
)
from .phased import BASE_SCHEDULER, PhasedPipeline, phased_class
from .routing import Route, guard_networks

_EXPERTS_ARGUMENTS = ("token", "cache_dir", "local_files_only")
_HUB_ARGUMENTS = (*_EXPERTS_ARGUMENTS, "revision", "force_download", "proxies")


def load_phased_pipeline(
    experts: str | Path | PhasedExperts,
    base: str | Path | None = None,
    experts_revision: str | None = None,
    merge: Merge = False,
    **kwargs: Any,
) -> PhasedPipeline:
    """Load a pipeline that samples with phased experts.

    Full experts take the place of the base's network, which is not loaded.

    Args:
        experts: An experts folder, a Hub id ``user/name``, opened experts, or a pipeline that was saved with its
            experts.
        base: The model folder or Hub id of the base; None takes the one that the manifest names.
        experts_revision: A branch, tag or commit of experts on the Hub.
        merge: Whether LoRA experts are merged into the base's weights as they take their turns, as ``attach_experts``
            says.
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
    if merge not in (False, True, "copies"):
        raise ExpertsError(f"merge= is True, False or 'copies', found {merge!r}")
    if isinstance(experts, PhasedExperts):
        return _load(experts, base, PhasedDMDScheduler.from_plan(experts.manifest.plan), merge, **kwargs)
    source, hub = str(experts), {name: kwargs[name] for name in _EXPERTS_ARGUMENTS if name in kwargs}
    at = {} if experts_revision is None else {"revision": experts_revision}
    if Path(source, "model_index.json").is_file() and not Path(source, MANIFEST_NAME).is_file():
        return _load_stock(source, **kwargs)
    try:
        opened = PhasedExperts.from_pretrained(experts, revision=experts_revision, **hub)
    except ExpertsError:
        if Path(source).is_dir() or not _is_saved(source, hub | at):
            raise
        return _load_stock(source, **(kwargs | at))
    if not _is_saved(source, hub | at):
        return load_phased_pipeline(opened, base, merge=merge, **kwargs)
    if base is None:
        base, kwargs = source, kwargs | at
    saved = _switched(PhasedDMDScheduler.from_pretrained(opened.folder, subfolder="scheduler"))
    return _load(opened, base, saved, merge, **kwargs)


def _load(
    experts: PhasedExperts, base: str | Path | None, walks_plan: PhasedDMDScheduler, merge: Merge, **kwargs: Any
) -> PhasedPipeline:
    manifest, kind = experts.manifest, DiffusionPipeline
    if base is None and manifest.base.model == UNKNOWN:
        raise ExpertsError("these LoRA files do not tell their base: pass its Hub id or folder as base=")
    source = str(base if base is not None else manifest.base.model)
    if base is None and manifest.base.revision:
        kwargs.setdefault("revision", manifest.base.revision)
    scheduler = _checked(kwargs.pop("scheduler", None), walks_plan)
    networks = None
    hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    index = load_index(source, hub)
    given = {name: kwargs[name] for name in index if isinstance(index[name], list) and kwargs.get(name) is not None}
    if kind_of(manifest) == "full":
        taken = [name for name in component_names(2) if isinstance(index.get(name), list)]
        if clash := [name for name in taken if name in given]:
            raise ExpertsError(
                f"full experts take the place of {clash[0]}: leave {clash[0]}= out, or take LoRA experts"
            )
        dtype, device = kwargs.get("dtype", kwargs.get("torch_dtype")), kwargs.get("device_map")
        if isinstance(dtype, dict):
            dtype = dtype.get(COMPONENT, dtype.get("default"))
        if device == "balanced":
            raise ExpertsError("device_map='balanced' cannot place full experts: use a device, or offloading")
        quantization = kwargs.get("quantization_config")
        if quantization is not None:
            quantization = quantization._resolve_quant_config(is_diffusers=True, module_name=COMPONENT)
        networks = full_networks(
            experts, functools.partial(empty_network, manifest.base.architecture, source, hub), dtype, quantization
        )
        networks = [network if device is None else network.to(device) for network in networks]
        kwargs |= dict(zip(taken, [*networks, None], strict=False))
    # DiffusionPipeline itself would load components that are optional in this class although they are given
    if "custom_pipeline" not in kwargs and (networks or given):
        kind = pipeline_class(source, index)
    family = known_family(manifest.base.architecture)
    if "custom_pipeline" not in kwargs and family is not None:
        kind = family.pipeline_of_images(manifest.training.get("pipeline"), index.get("_class_name")) or kind
    if index.get("scheduler") == SCHEDULER_ENTRY:  # saved with its experts; the base's own is beside it
        kwargs["scheduler"] = _base_scheduler(source, hub)
    try:
        pipe = kind.from_pretrained(source, **kwargs)
    except (OSError, ValueError) as error:
        raise no_base(source, error) from None
    if dropped := [name for name, value in given.items() if getattr(pipe, name, None) is not value]:
        raise ExpertsError(f"a {type(pipe).__name__} from {source!r} does not take {', '.join(dropped)}= as given")
    return attach_opened(pipe, experts, networks, scheduler, merge)


def _checked(given: object, scheduler: PhasedDMDScheduler) -> PhasedDMDScheduler:
    """The scheduler that a caller gave, which has to walk the plan; the experts' own where none was given."""
    if given is None:
        return scheduler
    if not isinstance(given, PhasedDMDScheduler) or given.plan != scheduler.plan:
        raise ExpertsError(
            f"phased experts walk the sigmas of their own plan, found scheduler= {type(given).__name__} of another: "
            "leave it out, or give a PhasedDMDScheduler of the experts' plan"
        )
    return cast(PhasedDMDScheduler, given)


def _switched(scheduler: PhasedDMDScheduler) -> PhasedDMDScheduler:
    """A scheduler that was saved, for a pipeline that switches experts."""
    made: PhasedDMDScheduler = PhasedDMDScheduler.from_config(scheduler.config, needs_switching=None)
    return made


def _base_scheduler(source: str, hub: dict[str, Any]) -> Any:
    """The base's own scheduler in a saved pipeline; one that can be replaced where there is none."""
    try:
        config = FlowMatchEulerDiscreteScheduler.load_config(source, subfolder=BASE_SCHEDULER, **hub)
    except (OSError, ValueError):
        return FlowMatchEulerDiscreteScheduler()
    return class_of(config.get("_class_name"), SchedulerMixin, f"{source}/{BASE_SCHEDULER} names").from_config(config)


def _is_saved(source: str, hub: dict[str, Any]) -> bool:
    """Whether a folder, or a repository of the Hub, is a pipeline that was saved with its experts."""
    try:
        return load_index(source, hub).get("scheduler") == SCHEDULER_ENTRY
    except ExpertsError:
        return False


def _load_stock(source: str, **kwargs: Any) -> PhasedPipeline:
    """Load a stock pipeline of full experts, as ``save_pretrained`` of a phased pipeline writes it."""
    hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    index = load_index(source, hub)
    names = [name for name in component_names(99) if isinstance(index.get(name), list) and index[name][0]]
    scheduler = _switched(PhasedDMDScheduler.from_pretrained(source, subfolder="scheduler", **hub))
    kind = pipeline_class(source, index)
    if scheduler.plan is None or len(names) != len(scheduler.plan) or kind is DiffusionPipeline:
        found = f"a plan of {len(scheduler.plan)} phases" if scheduler.plan else "no phase plan in scheduler/"
        raise ExpertsError(f"{source}: no {MANIFEST_NAME}, {len(names)} network(s) and {found}: not phased experts")
    plan, scheduler = scheduler.plan, _checked(kwargs.pop("scheduler", None), scheduler)
    pipe = phased_class(kind, len(names)).from_pretrained(source, scheduler=FlowMatchEulerDiscreteScheduler(), **kwargs)
    pipe.register_modules(scheduler=scheduler)
    networks, route = tuple(network_of(pipe, name) for name in names), Route(scheduler)
    pipe.__dict__["phased"] = Attachment(
        plan,
        float(index.get(GUIDANCE, 1.0)),
        route,
        None,
        networks,
        handles=guard_networks(networks, route),
    )
    return cast(PhasedPipeline, pipe)

"""Full experts in a pipeline: networks of the base's class with the experts' weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from ..experts import ExpertsError, PhasedExperts
from ..experts.format.untrusted import shown

COMPONENT = "transformer"
"""The component of a pipeline that denoises; full experts are this one, ``transformer_2``, ... N."""


def network_of(pipe: DiffusionPipeline, component: str) -> Any:
    """A network of the pipeline, without the wrapper of ``torch.compile``."""
    network = getattr(pipe, component, None)
    return getattr(network, "_orig_mod", network)


def component_names(count: int) -> list[str]:
    """The components of this many full experts, in the order of their phases."""
    return [COMPONENT, *(f"{COMPONENT}_{k}" for k in range(2, count + 1))]


def full_networks(
    experts: PhasedExperts, empty: Callable[[str], nn.Module], dtype: torch.dtype | None
) -> list[nn.Module]:
    """One network for each full expert, its weights from the expert's file. Raises ExpertsError."""
    networks = []
    for expert in experts.manifest.experts:
        network = empty(expert.component)
        try:
            network.load_state_dict(experts.tensors(expert.name), assign=True)
        except RuntimeError as error:
            raise ExpertsError(
                f"{experts.folder}: {expert.file} does not fit a {type(network).__name__} of the base "
                f"{experts.manifest.base.model!r}: {' '.join(str(error).split())[:300]}"
            ) from None
        in_float32 = getattr(network, "_keep_in_fp32_modules", None) or []
        for name, parameter in network.named_parameters():
            keep = any(part in in_float32 for part in name.split("."))
            parameter.data = parameter.data.to(torch.float32 if keep or dtype is None else dtype)
        networks.append(network.requires_grad_(False).eval())
    return networks


def empty_like(network: Any) -> nn.Module:
    """A network of the same class and config, without memory for its parameters."""
    return _without_weights(type(network), network.config)


def load_index(source: str, hub: Mapping[str, Any]) -> dict[str, Any]:
    """``model_index.json`` of a pipeline folder or Hub id. Raises ExpertsError."""
    try:
        return DiffusionPipeline.load_config(source, **hub)
    except (OSError, ValueError) as error:
        raise no_base(source, error) from None


def no_base(source: str, error: Exception) -> ExpertsError:
    """The error for a base that cannot be loaded, in one line."""
    reason = " ".join(str(error).split())[:300]
    return ExpertsError(f"cannot load the base {source!r} of these experts: {reason}; pass another as base=")


def pipeline_class(source: str, index: Mapping[str, Any]) -> Any:
    """The class that model_index.json names; the general one where that is code of the base. Raises ExpertsError."""
    name = index.get("_class_name")
    if isinstance(name, list):  # which diffusers runs only with trust_remote_code
        return DiffusionPipeline
    return _class(name, DiffusionPipeline, f"the base {source!r} names its pipeline")


def empty_network(architecture: str, source: str, hub: Mapping[str, Any], component: str) -> nn.Module:
    """A network of this class with the config of the base's component. Raises ExpertsError."""
    kind = _class(architecture, ModelMixin, "the manifest names its network")
    try:
        return _without_weights(kind, kind.load_config(source, subfolder=component, **hub))
    except (OSError, ValueError) as error:
        raise no_base(source, error) from None


def _class(name: object, of: type, who: str) -> Any:
    """The class of diffusers that a stranger's file names; of no other kind than ``of``."""
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, of)):
        raise ExpertsError(
            f"{who} {shown(name)}, which is no {of.__name__} of diffusers {diffusers.__version__}: upgrade diffusers, "
            "or ask the author of the file"
        )
    return found


def _without_weights(kind: Any, config: Mapping[str, Any]) -> nn.Module:
    """A network with its buffers but without memory for its parameters."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return kind.from_config(dict(config))

"""LoRA experts in a pipeline: one adapter for each phase on the pipeline's own network."""

from __future__ import annotations

import warnings
from collections.abc import MutableMapping
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from ..experts import ExpertsError, PhasedExperts
from ..families import family_of
from .networks import COMPONENT, network_of
from .routing import AdapterSwitch, Route

PREFIX = "phased_"
"""The start of the names of the experts' adapters, which are called ``phased_<phase name>``."""


def load_adapters(pipe: DiffusionPipeline, experts: PhasedExperts, route: Route) -> dict[str, AdapterSwitch]:
    """Load one adapter for each phase, and make what switches them on each component.

    Args:
        pipe: The pipeline; its networks get the adapters.
        experts: LoRA experts.
        route: Says which phase is current.

    Returns:
        The switch of each component that has experts, by the component's name.

    Raises:
        ExpertsError: If the experts do not fit the pipeline. The networks are then as they were.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise ExpertsError(f"a {type(pipe).__name__} loads no LoRA files: convert the experts to full ones")
    networks = {name: network_of(pipe, name) for name in dict.fromkeys(e.component for e in experts.manifest.experts)}
    for network in networks.values():
        _check_usable(network)
    active = {name: _active_adapters(network) for name, network in networks.items()}
    adapters: dict[str, dict[int, str]] = {name: {} for name in networks}
    try:
        for k, expert in enumerate(experts.manifest.experts):
            adapter, network = PREFIX + expert.name, networks[expert.component]
            tensors = experts.tensors(expert.name)
            second = _into(expert.component, experts.manifest.base.architecture)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are the point
                pipe.load_lora_weights(dict(tensors), adapter_name=adapter, **second)
            expected = sum(key.endswith((".lora_up.weight", ".lora_B.weight")) for key in tensors)
            adapted = sum(adapter in layer._all_available_adapter_names() for layer in _tuner_layers(network).values())
            if adapted < expected or not adapted:
                raise ExpertsError(
                    f"{expert.file}: only {adapted} of its {expected} adapted modules exist in the pipeline's "
                    f"{type(network).__name__}: the file is of another model or layout"
                )
            adapters[expert.component][k] = adapter
    except Exception as error:
        for name, network in networks.items():
            remove_adapters(network)
            _activate(network, active[name])
        if isinstance(error, ExpertsError):
            raise
        raise ExpertsError(
            f"{experts.folder}: these experts do not fit the pipeline: {' '.join(str(error).split())[:300]}"
        ) from None
    for name, network in networks.items():
        _activate(network, [*active[name], adapters[name][min(adapters[name])]])
    return {name: AdapterSwitch(route, network, adapters[name]) for name, network in networks.items()}


def _into(component: str, architecture: str) -> dict[str, Any]:
    """Arguments of ``load_lora_weights`` for a network of the pipeline."""
    if component == COMPONENT:
        return {}
    try:
        return family_of(architecture).lora_arguments(component)
    except ValueError as error:
        raise ExpertsError(str(error)) from None


def _check_usable(network: Any) -> None:
    """Refuse a network that carries experts already, or on which a LoRA is fused or disabled."""
    if any(name.startswith(PREFIX) for name in getattr(network, "peft_config", {})):
        raise ExpertsError(
            "the network of this pipeline carries the phased experts of another pipeline: call "
            "attach_experts(this_pipeline, that_pipeline), or detach_experts(that_pipeline) first"
        )
    for layer in _tuner_layers(network).values():
        if layer.merged_adapters:
            raise ExpertsError("a LoRA is fused into this pipeline, which switches others off: unload_lora_weights()")
        if layer.disable_adapters:
            raise ExpertsError("LoRA is disabled in this pipeline: call enable_lora() first")


def _tuner_layers(network: nn.Module) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


def _active_adapters(network: nn.Module) -> list[str]:
    return list(dict.fromkeys(name for layer in _tuner_layers(network).values() for name in layer.active_adapters))


def _activate(network: nn.Module, adapters: list[str]) -> None:
    for layer in _tuner_layers(network).values():
        layer.set_adapter([*adapters], inference_mode=True)  # one list for all layers would be a guard of torch.compile


def remove_adapters(network: Any) -> None:
    """Remove the experts' adapters from a network, and the layers of peft that hold no other adapter.

    Args:
        network: A network on which ``load_adapters`` has put experts.
    """
    active = [name for name in _active_adapters(network) if not name.startswith(PREFIX)]
    network.delete_adapters([name for name in getattr(network, "peft_config", {}) if name.startswith(PREFIX)])
    for name, layer in _tuner_layers(network).items():
        if not layer._all_available_adapter_names():
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, layer.get_base_layer())
    _activate(network, active)
    if not getattr(network, "peft_config", None):
        network.__dict__.pop("peft_config", None)
        network.__dict__.pop("_hf_peft_config_loaded", None)


def without_adapters(network: nn.Module, state: MutableMapping[str, Any], prefix: str, _: dict[str, Any]) -> None:
    """Take adapters out of a state dict, which leaves the names and weights of the network without peft.

    This is a hook for ``register_state_dict_post_hook``.

    Args:
        network: The network that the state dict is of.
        state: The state dict, which is changed in place.
        prefix: What the names of the network's weights start with in it.
    """
    layers = _tuner_layers(network)
    for key in list(state):
        layer, found, rest = key.removeprefix(prefix).partition(".base_layer.")
        if found and layer in layers:
            state[f"{prefix}{layer}.{rest}"] = state.pop(key)
        elif any(key.startswith(f"{prefix}{name}.") for name in layers):
            del state[key]

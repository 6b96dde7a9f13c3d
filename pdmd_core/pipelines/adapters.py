"""LoRA experts in a pipeline: one adapter for each phase on the pipeline's own network."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from torch import nn

from ..experts import ExpertsError, PhasedExperts
from .networks import COMPONENT, network_of
from .routing import AdapterSwitch, Route

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

PREFIX = "phased_"
"""Adapters of LoRA experts are called ``phased_<phase name>``."""


def load_adapters(pipe: DiffusionPipeline, experts: PhasedExperts, route: Route) -> list[RemovableHandle]:
    """Load one adapter for each phase and hook the switch; on an error the pipeline is as it was."""
    if not hasattr(pipe, "load_lora_weights"):
        raise ExpertsError(f"a {type(pipe).__name__} loads no LoRA files: convert the experts to full ones")
    adapters: dict[str, dict[int, str]] = {}
    active = {name: _active_adapters(network_of(pipe, name)) for name in (COMPONENT, f"{COMPONENT}_2")}
    try:
        for k, expert in enumerate(experts.manifest.experts):
            adapter, network = PREFIX + expert.name, network_of(pipe, expert.component)
            tensors = experts.tensors(expert.name)
            second = {"load_into_transformer_2": True} if expert.component != COMPONENT else {}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are the point
                pipe.load_lora_weights(dict(tensors), adapter_name=adapter, **second)
            expected = sum(key.endswith((".lora_up.weight", ".lora_B.weight")) for key in tensors)
            adapted = sum(adapter in layer._all_available_adapter_names() for layer in _tuner_layers(network))
            if adapted < expected or not adapted:
                raise ExpertsError(
                    f"{expert.file}: only {adapted} of its {expected} adapted modules exist in the pipeline's "
                    f"{type(network).__name__}: the file is of another model or layout"
                )
            adapters.setdefault(expert.component, {})[k] = adapter
    except Exception as error:
        for name in active:
            remove_adapters(network_of(pipe, name))
            _activate(network_of(pipe, name), active[name])
        if isinstance(error, ExpertsError):
            raise
        raise ExpertsError(
            f"{experts.folder}: these experts do not fit the pipeline: {' '.join(str(error).split())[:300]}"
        ) from None
    handles = []
    for component, names in adapters.items():
        network = network_of(pipe, component)
        _activate(network, [*active[component], names[min(names)]])
        switch = AdapterSwitch(route, network, names)
        handles.append(network.register_forward_pre_hook(switch, with_kwargs=True))
    return handles


def _tuner_layers(network: nn.Module | None) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)] if network is not None else []


def _active_adapters(network: nn.Module | None) -> list[str]:
    return next((list(layer.active_adapters) for layer in _tuner_layers(network)), [])


def _activate(network: nn.Module | None, adapters: list[str]) -> None:
    for layer in _tuner_layers(network):
        layer.set_adapter(adapters, inference_mode=True)


def remove_adapters(network: Any) -> None:
    """Take the experts' adapters out; with the last adapter of all, peft's layers too."""
    names = list(getattr(network, "peft_config", {}))
    own = [name for name in names if name.startswith(PREFIX)]
    if network is None or not own:
        return
    if len(own) == len(names):
        network.unload_lora()
    else:
        active = [name for name in _active_adapters(network) if name not in own]
        network.delete_adapters(own)
        _activate(network, active)

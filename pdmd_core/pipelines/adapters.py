"""LoRA experts in a pipeline: one adapter for each phase on the pipeline's own network."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, MutableMapping
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import Tensor, nn

from ..experts import Expert, ExpertsError, PhasedExperts
from ..experts.format.files import RELEASED
from ..experts.lora.changes import Change, LowRank, sum_of
from ..families import FAMILIES, ModelFamily, family
from .differences import Differences, weight_shapes
from .merging import Merge, MergedExperts
from .networks import COMPONENT, network_of
from .other_loras import load_unknown
from .routing import AdapterSwitch, Route
from .settings import casting_of

logger = logging.get_logger(f"diffusers.{__name__}")

PREFIX = "phased_"
"""The start of the names of the experts' adapters, which are called ``phased_<phase name>``."""


def load_adapters(
    pipe: DiffusionPipeline, experts: PhasedExperts, route: Route, merge: Merge = False
) -> dict[str, AdapterSwitch]:
    """Load one adapter for each phase, and make what switches them on each component.

    Args:
        pipe: The pipeline; its networks get the adapters.
        experts: LoRA experts.
        route: Says which phase is current.
        merge: Whether experts are merged into the weights as they take their turns, instead of adapters.

    Returns:
        The switch of each component that has experts, by the component's name.

    Raises:
        ExpertsError: If the experts do not fit the pipeline. The networks are then as they were.
    """
    known = family(name) if (name := experts.manifest.base.family) in FAMILIES else None
    if known is None and not hasattr(pipe, "load_lora_weights"):
        raise ExpertsError(f"a {type(pipe).__name__} loads no LoRA files: convert the experts to full ones")
    networks = {name: network_of(pipe, name) for name in dict.fromkeys(e.component for e in experts.manifest.experts)}
    for network in networks.values():
        if not hasattr(network, "delete_adapters"):
            raise ExpertsError(f"a {type(network).__name__} takes no adapters: convert the experts to full ones")
        _check_usable(network)
    active = {name: _active_adapters(network) for name, network in networks.items()}
    adapters: dict[str, dict[int, str | None]] = {name: {} for name in networks}
    differences = {
        name: MergedExperts(network, merge == "copies") if merge else Differences(network)
        for name, network in networks.items()
    }
    try:
        for k, expert in enumerate(experts.manifest.experts):
            network, adapter = networks[expert.component], PREFIX + expert.name
            if known is None and any(casting_of(module) is not None for module in network.modules()):
                raise ExpertsError(
                    "layerwise casting is on in this pipeline and would round the LoRA experts: attach them first, "
                    "then enable_layerwise_casting()"
                )
            turns = differences[expert.component]
            if known is None:
                changes = load_unknown(pipe, network, experts, expert, adapter)
            elif merge:
                changes = _known_changes(network, experts, expert)
            else:
                changes = _load_known(pipe, known, network, experts, expert, adapter)
            turns.add(k, changes, expert.file)
            if isinstance(turns, MergedExperts):
                turns.add_adapter(k, adapter, expert.file)
            held = any(adapter in layer._all_available_adapter_names() for layer in _tuner_layers(network).values())
            adapters[expert.component][k] = adapter if held else None
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
        if merge:
            remove_adapters(network)
            adapters[name] = dict.fromkeys(adapters[name])
        first = adapters[name][min(adapters[name])]
        _activate(network, [*active[name], *([] if first is None else [first])])
    return {
        name: AdapterSwitch(route, network, adapters[name], differences[name]) for name, network in networks.items()
    }


def _load_known(
    pipe: DiffusionPipeline, known: ModelFamily, network: Any, experts: PhasedExperts, expert: Expert, adapter: str
) -> dict[str, list[Change]]:
    """Load the products of a LoRA file of a known family as an adapter; returns the other changes of weights."""
    state: dict[str, Tensor] = {}
    others: dict[str, list[Change]] = {}
    for name, changes in _known_changes(network, experts, expert).items():
        products = [change for change in changes if isinstance(change, LowRank)]
        if len(products) < len(changes):
            others[name] = [change for change in changes if not isinstance(change, LowRank)]
        if products:
            module = f"{COMPONENT}.{name.removesuffix('.weight')}"
            down, up = sum_of(products).scaled_factors()
            state |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    if not state:
        return others
    try:
        known.lora_arguments(expert.component)
    except ValueError as error:
        raise ExpertsError(str(error)) from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are the point
        known.load_lora(pipe, state, expert.component, adapter_name=adapter)
    for layer in _tuner_layers(network).values():
        if adapter in layer._all_available_adapter_names():  # whatever the loader makes of ranks that differ
            layer.lora_alpha[adapter], layer.scaling[adapter] = layer.r[adapter], 1.0
    _undo_rounding(network, adapter, state)
    return others


def _known_changes(network: Any, experts: PhasedExperts, expert: Expert) -> dict[str, list[Change]]:
    """All changes of weights in a LoRA file of a known family; what has no place is named."""
    kind = type(network).__name__
    file = experts.lora_changes(expert.name).fitted(weight_shapes(network), kind)
    if text := file.warning(kind):
        if RELEASED not in experts.manifest.training:
            raise ExpertsError(f"{text}; these experts were distilled from another base")
        logger.warning(text)
    return dict(file.weights)


def _undo_rounding(network: nn.Module, adapter: str, state: Mapping[str, Tensor]) -> None:
    """Give an adapter on layers that are stored in a lower dtype its weights again, in the dtype of computations."""
    for name, layer in _tuner_layers(network).items():
        hook = casting_of(layer.get_base_layer())
        if hook is None or adapter not in layer._all_available_adapter_names():
            continue
        for part in ("lora_A", "lora_B"):
            weight = getattr(layer, part)[adapter].weight
            weight.data = state[f"{COMPONENT}.{name}.{part}.weight"].to(weight.device, hook.compute_dtype)


def _check_usable(network: Any) -> None:
    """Refuse a network that carries experts already, or on which a LoRA is fused or disabled."""
    if any(name.startswith(PREFIX) for name in getattr(network, "peft_config", {})):
        raise ExpertsError(
            "the network of this pipeline carries the phased experts of another pipeline: call "
            "attach_experts(this_pipeline, that_pipeline), or detach_experts(that_pipeline) first"
        )
    if any(getattr(module, "fused_projections", False) for module in network.modules()):
        raise ExpertsError("query, key and value are fused in this pipeline, past any LoRA: unfuse_qkv_projections()")
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
    if own := [name for name in getattr(network, "peft_config", {}) if name.startswith(PREFIX)]:
        network.delete_adapters(own)
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

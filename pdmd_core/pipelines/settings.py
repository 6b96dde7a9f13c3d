"""What users set on the network of a pipeline, brought to all full experts that take its turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def settings_of(network: Any) -> tuple[object, ...]:
    """Tell what is set on a network beside its weights.

    Args:
        network: A network of diffusers.

    Returns:
        Values that are equal while nothing changes: its cache, attention processors with their backends, an adapter for
        image prompts, layers whose weights are cast.
    """
    processors = [
        (name, id(module.processor), str(getattr(module.processor, "_attention_backend", None)))
        for name, module in network.named_modules()
        if hasattr(module, "processor")
    ]
    cast = [name for name, module in network.named_modules() if casting_of(module) is not None]
    return (id(_cache(network)), tuple(processors), id(getattr(network, "encoder_hid_proj", None)), tuple(cast))


def give_settings(source: Any, networks: Sequence[Any]) -> None:
    """Set on networks what is set on another of their class.

    Attention processors and what image prompts go through are shared: a scale that is set on one counts for all.

    Args:
        source: The network on which a user set them.
        networks: The networks to follow it.
    """
    for network in networks:
        for name, module in source.named_modules():
            if hasattr(module, "processor") and hasattr(module, "set_processor"):
                network.get_submodule(name).set_processor(module.processor)
            if (hook := casting_of(module)) is not None and casting_of(network.get_submodule(name)) is None:
                _cast(network.get_submodule(name), hook)
        if getattr(source, "encoder_hid_proj", None) is not getattr(network, "encoder_hid_proj", None):
            network.encoder_hid_proj = source.encoder_hid_proj
        if _cache(source) is not _cache(network):
            if _cache(network) is not None:
                network.disable_cache()
            if _cache(source) is not None:
                network.enable_cache(_cache(source))


def _cache(network: Any) -> Any:
    return getattr(network, "_cache_config", None)


def casting_of(module: nn.Module) -> Any:
    """Look up the layerwise casting of a layer.

    Args:
        module: A layer of a network.

    Returns:
        The hook, with its ``storage_dtype`` and ``compute_dtype``; None where there is none.
    """
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook("layerwise_casting")


def _cast(module: nn.Module, hook: Any) -> None:
    from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook

    module.to(hook.storage_dtype)
    apply_layerwise_casting_hook(module, hook.storage_dtype, hook.compute_dtype, hook.non_blocking)

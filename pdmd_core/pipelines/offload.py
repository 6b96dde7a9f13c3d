"""Offloading of phased pipelines, where diffusers' own takes networks of one class for the same."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from ..experts import ExpertsError

_SIGNATURE = inspect.signature(DiffusionPipeline.enable_group_offload)


@functools.wraps(DiffusionPipeline.enable_group_offload)
def offload_groups(pipe: DiffusionPipeline, *args: Any, **kwargs: Any) -> None:
    """Offload a pipeline in groups as diffusers does, with a folder on disk for each component.

    Args:
        pipe: The pipeline.
        *args: Arguments of ``DiffusionPipeline.enable_group_offload``.
        **kwargs: Arguments of ``DiffusionPipeline.enable_group_offload``.
    """
    from diffusers.hooks import apply_group_offloading

    options = _SIGNATURE.bind(pipe, *args, **kwargs).arguments
    excluded, disk = options.pop("exclude_modules", None) or [], options.pop("offload_to_disk_path", None)
    del options["self"]
    for name, component in pipe.components.items():
        if not isinstance(component, nn.Module):
            continue
        if name == excluded or (isinstance(excluded, list) and name in excluded):
            component.to(options["onload_device"])
            continue
        offload = getattr(component, "enable_group_offload", functools.partial(apply_group_offloading, component))
        offload(**options, offload_to_disk_path=str(Path(disk) / name) if disk is not None else None)


def check_disk_files(networks: Mapping[str, nn.Module]) -> None:
    """Check that no two networks are offloaded to the same files on disk, where one would get the other's weights.

    Args:
        networks: Networks by component name.

    Raises:
        ExpertsError: If two networks share a file.
    """
    owner: dict[str, str] = {}
    for name, network in networks.items():
        for path in disk_files(network):
            if owner.setdefault(path, name) != name:
                raise ExpertsError(
                    f"{name} and {owner[path]} are offloaded to the same folder, {Path(path).parent}, and would get "
                    "each other's weights: load the pipeline again and give each its own offload_to_disk_path"
                )


def disk_files(network: nn.Module) -> set[str]:
    """List the files in which group offloading keeps the weights of a network, whose tensors then hold no values.

    Args:
        network: A network of a pipeline.

    Returns:
        Paths of safetensors files; empty where nothing is offloaded to disk.
    """
    groups = [getattr(hook, "group", None) for module in network.modules() for hook in _hooks(module).values()]
    return {group.safetensors_file_path for group in groups if group is not None and group.offload_to_disk_path}


def _hooks(module: Any) -> dict[str, Any]:
    return module._diffusers_hook.hooks if hasattr(module, "_diffusers_hook") else {}


def is_offloaded_in_parts(network: nn.Module) -> bool:
    """Check whether sequential or group offloading is on, whose hooks sit on the network's own layers.

    Args:
        network: A network of a pipeline.

    Returns:
        Whether it is on.
    """
    layers = list(network.modules())[1:]
    return any(hasattr(layer, "_hf_hook") or "group_offloading" in _hooks(layer) for layer in layers)


@contextmanager
def offloaded_again(pipe: Any) -> Iterator[None]:
    """Take model CPU offload off while components change, and set it up again afterwards.

    Args:
        pipe: The pipeline.

    Yields:
        Nothing; the components may be changed within the block.
    """
    device = pipe._offload_device if getattr(pipe, "_all_hooks", None) else None
    if device is not None:
        pipe.remove_all_hooks()
    try:
        yield
    finally:
        if device is not None:
            pipe.enable_model_cpu_offload(device=device)

"""Context parallelism: a group of processes shares one sample's tokens (Ulysses attention of diffusers).

Between attentions each process of a group has a part of the tokens, inside an attention a part of the heads. So the
processes of a group draw the same samples and end with the same loss; the gradients of weights are sums over a
process's own tokens, and those of a group add up to that of one process.
"""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, DiffusionPipeline, ParallelConfig
from diffusers.hooks import apply_context_parallel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional

from pdmd_core.families import ModelFamily
from training.config.schema import ConfigError, DistillConfig
from training.data.buckets import Bucket
from training.data.teacher import networks_of
from training.data.training_data import buckets_of, latent_shapes
from training.loop.attention import NORMS, as_attention_computes

_TEXT = "encoder_hidden_states"


def check_context_parallel(config: DistillConfig, family: ModelFamily, pipeline: DiffusionPipeline) -> None:
    """Raises ConfigError when a sample of this teacher cannot be divided as configured. Weights are not looked at."""
    degree, model = config.parallel.context_parallel, config.model
    if degree == 1:
        return
    network: Any = next(iter(networks_of(pipeline, family).values()))
    kind, settings = type(network).__name__, network.config
    if getattr(network, "_cp_plan", None) is None or not family.context_parallel:
        raise ConfigError(f"parallel.context_parallel: diffusers cannot divide the tokens of {kind}: leave it out")
    if settings["num_attention_heads"] % degree:
        raise ConfigError(
            f"parallel.context_parallel: {degree} processes cannot divide the {settings['num_attention_heads']} "
            f"attention heads of {kind}"
        )
    backend, _ = _AttentionBackendRegistry.get_active_backend()
    if not _AttentionBackendRegistry._is_context_parallel_available(backend):
        raise ConfigError(
            f"parallel.context_parallel: diffusers cannot divide attention with its backend {backend.value}: leave "
            "DIFFUSERS_ATTN_BACKEND unset"
        )
    patch = settings["patch_size"]
    sides = (1, patch, patch) if isinstance(patch, int) else tuple(patch)
    buckets = [*buckets_of(config), Bucket(model.width, model.height, model.frames)]
    for bucket, (_, *shape) in zip(buckets, latent_shapes(buckets, family, pipeline), strict=True):
        frames, rows, columns = (size // side for size, side in zip(shape, sides, strict=True))
        if (tokens := frames * rows * columns) % degree:
            step = degree // math.gcd(degree, frames * rows)
            width = bucket.width // columns * math.ceil(columns / step) * step
            raise ConfigError(
                f"parallel.context_parallel: {degree} processes cannot divide the {tokens} tokens of {bucket}; they "
                f"can with a width of {width}"
            )


def divide_samples(networks: Iterable[Any], degree: int, device: torch.device) -> None:
    """From now on neighbouring processes, in groups of ``degree``, evaluate these diffusers networks together.

    What ``enable_parallelism`` of diffusers does, which would ask for a GPU and knows one group only.
    """
    groups = dist.get_world_size() // degree
    mesh = init_device_mesh(device.type, (groups, 1, degree), mesh_dim_names=("group", "ring", "ulysses"))
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=degree, mesh=mesh))
    config.setup(dist.get_rank(), dist.get_world_size(), device, mesh=mesh)
    # It warns of a timestep that is one for all tokens, and rightly not divided.
    logging.getLogger("diffusers.hooks.context_parallel").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*all_gather_tensor. is deprecated")  # diffusers calls it
    for network in networks:
        for module in network.modules():
            processor: Any = getattr(module, "processor", None)
            if hasattr(processor, "_parallel_config"):
                processor._parallel_config = config
                for name in NORMS & set(dict(module.named_children())):
                    module.get_submodule(name).register_forward_hook(as_attention_computes)
        apply_context_parallel(network, config.context_parallel_config, network._cp_plan)
        if any(isinstance(inputs, dict) and _TEXT in inputs for inputs in network._cp_plan.values()):
            network.register_forward_pre_hook(partial(_make_divisible, degree), with_kwargs=True)


def _make_divisible(
    degree: int, network: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Where prompts are divided too: zeros after them, which the mask hides."""
    tokens = named["hidden_states"].shape[1]
    if tokens % degree:  # a given image has tokens beside those of the sample
        raise ConfigError(
            f"parallel.context_parallel: {degree} processes cannot divide the {tokens} tokens of sample and image"
        )
    text: Tensor = named[_TEXT]
    missing = -text.shape[1] % degree
    if not missing:
        return positional, named
    # whatever the network calls it
    masks = [each for each in inspect.signature(type(network).forward).parameters if each.startswith("encoder_")]
    (name,) = (each for each in masks if each.endswith("_mask"))
    mask = named[name]
    mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask
    padded = {_TEXT: functional.pad(text, (0, 0, 0, missing)), name: functional.pad(mask, (0, missing))}
    return positional, named | padded

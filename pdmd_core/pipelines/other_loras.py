"""LoRA files of networks of no model family here: the pipeline's own loader reads them, and what it drops is named."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import Tensor

from ..experts import Expert, ExpertsError, PhasedExperts
from ..experts.lora.alpha import Alphas
from ..experts.lora.changes import Change, Dense
from ..experts.lora.keys import by_module, summary
from ..families.module_names import PREFIXES
from .differences import weight_shapes
from .networks import COMPONENT

logger = logging.get_logger(f"diffusers.{__name__}")

_LOADED = {"down", "up", "alpha", "up bias"}
"""Parts of a module that pipelines' own loaders read."""
_WITH_ALPHA = ("lora_unet_", "lora_transformer_", "diffusion_model.")
"""Prefixes of layouts whose loaders look for alpha; at diffusers' own names they refuse it."""


def load_unknown(
    pipe: DiffusionPipeline, network: Any, experts: PhasedExperts, expert: Expert, adapter: str
) -> dict[str, list[Change]]:
    """Load a LoRA file by the pipeline's own loader, and name in a warning what of it changes nothing.

    Args:
        pipe: The pipeline.
        network: Its network.
        experts: The experts.
        expert: The one to load.
        adapter: The name of its adapter.

    Returns:
        Changes of weights that are no products.

    Raises:
        ExpertsError: If nothing of the file fits, or if it holds what is not applied.
    """
    if expert.component != COMPONENT:
        raise ExpertsError(f"{expert.file} is for {expert.component}: a network of no known family is {COMPONENT}")
    kind = type(network).__name__
    pairs, others, left_out = _sorted(experts.tensors(expert.name), experts.alphas(expert.name), network, expert)
    modules = {name.replace("_orig_mod.", "").replace(".base_layer", "") for name, _ in network.named_modules()}
    homeless = {module for module, layers in _places(pipe, pairs).items() if not layers & modules}
    pairs_left_out = [
        key for module, keys in by_module(pairs)[0].items() if module in homeless for key in keys.values()
    ]
    left_out += pairs_left_out
    if not others and len(pairs_left_out) == len(pairs):
        raise ExpertsError(f"{expert.file}: none of its keys belongs to a {kind}: the file is of another model")
    if pairs:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are the point
            pipe.load_lora_weights(dict(pairs), adapter_name=adapter)
    for name, _ in list(network.named_modules()):
        if name.endswith(f".lora_B.{adapter}"):
            layer = network.get_submodule(name.removesuffix(f".lora_B.{adapter}"))
            layer.lora_alpha[adapter] *= expert.strength
            layer.scaling[adapter] *= expert.strength
    if left_out:
        logger.warning(
            f"{expert.file}: {len(left_out)} of its keys have no place in this {kind} and change nothing: "
            f"{summary(left_out)}"
        )
    return {name: [change.scaled(expert.strength) for change in found] for name, found in others.items()}


def _sorted(
    tensors: Mapping[str, Tensor], alphas: Alphas, network: Any, expert: Expert
) -> tuple[dict[str, Tensor], dict[str, list[Change]], list[str]]:
    """What the loader reads, with alpha where it looks for it; plain differences; and the keys that are neither."""
    modules, left_out = by_module(tensors)
    shapes = weight_shapes(network)
    pairs: dict[str, Tensor] = {}
    others: dict[str, list[Change]] = {}
    for module, meanings in modules.items():
        keys = dict(meanings)
        own = next((module.removeprefix(prefix) for prefix in (*PREFIXES, "") if module.startswith(prefix)), module)
        for meaning, kind in (("weight difference", "weight"), ("bias difference", "bias")):
            name = f"{own}.{kind}"
            if meaning in keys and shapes.get(name) == tuple(tensors[keys[meaning]].shape):
                others.setdefault(name, []).append(Dense(tensors[keys.pop(meaning)]))
            elif meaning in keys:
                left_out.append(keys.pop(meaning))
        if unread := sorted(set(keys) - _LOADED):
            raise ExpertsError(
                f"{expert.file}: {keys[unread[0]]} ({unread[0]}) is not applied to a network of this kind"
            )
        if set(keys) >= {"down", "up"}:
            pairs |= _pair(module, {meaning: tensors[key] for meaning, key in keys.items()}, keys, alphas)
        else:
            left_out += keys.values()
    return pairs, others, left_out


def _pair(module: str, parts: dict[str, Tensor], keys: Mapping[str, str], alphas: Alphas) -> dict[str, Tensor]:
    """One module with alpha in its projection from the rank; the tensor of alpha stays where loaders look for one."""
    rank, alpha = parts["down"].shape[0], parts.pop("alpha", None)
    scale = alphas.scale(module, rank, None if alpha is None else float(alpha))
    for part in ("up", "up bias"):
        if part in parts and scale != 1.0:
            parts[part] = (scale * parts[part].float()).to(parts[part].dtype)
    if alpha is not None and module.startswith(_WITH_ALPHA):
        parts["alpha"] = torch.tensor(float(rank))
    return {keys[part]: value for part, value in parts.items()}


def _places(pipe: DiffusionPipeline, pairs: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """The layers on which each module of the file ends up.

    The pipeline's own converter is asked, with numbers in the place of values that say which module they are of.
    """
    modules, _ = by_module(pairs)
    found: dict[str, set[str]] = {name: set() for name in modules}
    marked: dict[str, Tensor] = {}
    for number, (_, keys) in enumerate(modules.items(), start=1):
        for meaning, key in keys.items():
            value = {"up": float(number), "alpha": float(pairs[keys["down"]].shape[0])}.get(meaning, 0.0)
            marked[key] = torch.full(pairs[key].shape, value)
    converted: Any = pipe.lora_state_dict(marked) if marked else {}
    names = list(modules)
    for key, value in (converted[0] if isinstance(converted, tuple) else converted).items():
        if key.endswith(".lora_B.weight"):
            layer = key.removesuffix(".lora_B.weight").removeprefix(f"{COMPONENT}.")
            for number in value.unique().tolist():
                if 1 <= number <= len(names):
                    found[names[int(number) - 1]].add(layer)
    return found

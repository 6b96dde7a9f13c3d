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

logger = logging.get_logger(__name__)

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
    if pairs:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are the point
            pipe.load_lora_weights(dict(pairs), adapter_name=adapter)
    adapted = {name for name, _ in network.named_modules() if name.endswith(f".lora_B.{adapter}")}
    layers = {name.removesuffix(f".lora_B.{adapter}").replace("_orig_mod.", "") for name in adapted}
    left_out += _not_loaded(pipe, pairs, layers)
    if not adapted and not others:
        raise ExpertsError(f"{expert.file}: none of its keys belongs to a {kind}: the file is of another model")
    for name in adapted:
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


def _not_loaded(pipe: DiffusionPipeline, pairs: Mapping[str, Tensor], layers: set[str]) -> list[str]:
    """The keys whose products are on none of these layers.

    The pipeline's own converter is asked once more, with numbers in the place of values that say where they end up.
    """
    modules, _ = by_module(pairs)
    names = list(modules)
    marked: dict[str, Tensor] = {}
    for number, name in enumerate(names, start=1):
        for meaning, key in modules[name].items():
            value = float(number) if meaning == "up" else float(pairs[modules[name]["down"]].shape[0])
            marked[key] = torch.full(pairs[key].shape, value if meaning in ("up", "alpha") else 0.0)
    converted: Any = pipe.lora_state_dict(marked)
    converted = converted[0] if isinstance(converted, tuple) else converted
    seen: set[int] = set()
    for key, value in converted.items():
        if key.endswith(".lora_B.weight") and key.removesuffix(".lora_B.weight").partition(".")[2] in layers:
            seen |= {int(number) for number in value.unique().tolist()}
    return [key for number, name in enumerate(names, start=1) if number not in seen for key in modules[name].values()]

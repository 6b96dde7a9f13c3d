"""LoRA files of any program on a MODEL: what ComfyUI's loader does not read is read here, and the rest is named."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.weight_adapter
import torch

from ..pdmd_core.experts.lora.alpha import Alphas
from ..pdmd_core.experts.lora.changes import LowRank, sum_of
from ..pdmd_core.experts.lora.file import LoraFile, read_lora
from ..pdmd_core.experts.lora.joined import joined
from ..pdmd_core.experts.lora.keys import by_module, summary
from ..pdmd_core.families import FAMILIES, ModelFamily, ModuleNames, family, family_of_lora
from .bypass import Product, put_beside, split
from .errors import NodeError

logger = logging.getLogger(__name__)

_EXACT = (torch.float32, torch.float16, torch.bfloat16)
_OURS = {"up bias", "modulation difference"}
"""Parts of a module that ComfyUI's loader passes over; magnitudes of PEFT are another."""
Patches = dict[Any, Any]
"""Weight of the MODEL, or weight and part of it, to what ComfyUI patches it with."""


@dataclass(frozen=True)
class Lora:
    """A LoRA file in memory."""

    tensors: Mapping[str, Any]
    """Its tensors by the keys of the file."""
    alphas: Alphas
    """What its metadata say of alpha."""
    what: str
    """What the file is, for errors and warnings."""
    component: str = "transformer"
    """The network of the base that it is for."""
    family: str | None = None
    """The family of the file, where that is known; its keys or the MODEL tell it otherwise."""


def apply_lora(model: Any, lora: Lora, strength: float, warn: Callable[[str], None], beside: bool = False) -> Any:
    """Put a LoRA onto a clone of a MODEL.

    Args:
        model: The MODEL.
        lora: The LoRA file.
        strength: The strength.
        warn: Is told, in one line, which keys have no place in the MODEL's network.
        beside: Whether products are computed beside the weights (``bypass``); they are merged otherwise.

    Returns:
        The clone.

    Raises:
        NodeError: If no key finds a place, or if a shape differs.
        ExpertsError: If the file holds what is not applied.
    """
    targets, network = comfy.lora.model_lora_keys_unet(model.model, {}), type(model.model).__name__
    known, rest = _sorted(lora, targets)
    patches, left_out = _loaded(known, targets, lora.what)
    parts, tables = [patches], {}
    found = _family(lora, model) if rest else None
    if found is None:
        left_out += rest
    else:
        rest, absent = _with_place(rest, found.lora_names, targets, model)
        left_out += absent
        file = read_lora(rest, lora.alphas, found.lora_names, lora.what, lora.component)
        low_rank, differences, without_place = _patches(file, found.lora_names, targets, model)
        tables = {key: differences.pop(key) for key in list(differences) if _is_table(model, key)}
        parts += [low_rank, differences]
        left_out += [*file.left_out, *without_place]
    patched = model.clone()
    for key, (_, (value,)) in tables.items():
        before = patched.get_model_object(key)
        _check_shapes(model, {key: tables[key]}, lora.what)
        after = before.detach().float() + strength * value.to(before.device)
        patched.add_object_patch(key, torch.nn.Parameter(after.to(before.dtype), requires_grad=False))
    applied, products = len(tables), list[Product]()
    for part in parts:
        _check_shapes(model, part, lora.what)
        if beside:
            found_beside, part = split(part, model, strength)
            products += found_beside
            if part:
                logger.info(f"{lora.what}: {len(part)} changes are no products and are merged, at each switch")
        kept = set(patched.add_patches(part, strength)) if part else set[Any]()
        applied += len(kept)
        left_out += [f"{target} of the LoRA" for target in part if target not in kept]
    if products:
        put_beside(patched, products)
    if not applied and not products:
        raise NodeError(f"{lora.what}: no key of this LoRA belongs to a {network}{_why(lora, model)}")
    if left_out:
        warn(
            f"{lora.what}: {len(left_out)} of its keys have no place in this {network} and change nothing: "
            f"{summary(left_out)}"
        )
    return patched


def _family(lora: Lora, model: Any) -> ModelFamily | None:
    """The family whose names a file has."""
    if lora.family in FAMILIES:
        return family(lora.family)
    found = family_of_lora(list(by_module(lora.tensors)[0]))
    return _family_of_network(model) if found is None else found


def _family_of_network(model: Any) -> ModelFamily | None:
    """The family, of those whose layers ComfyUI joins, that knows all of a MODEL's modules outside the blocks."""
    names = [name for name in model.model.diffusion_model.state_dict() if "." in name]
    for found in map(family, FAMILIES):
        if found.native_layout is None:
            continue
        blocks = tuple(f"{blocks.native}." for blocks in found.native_layout.blocks)
        outside = {name.rpartition(".")[0] for name in names if not name.startswith(blocks)}
        if outside <= set(found.native_layout.outside):
            return found
    return None


def _sorted(lora: Lora, targets: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ComfyUI's own loader reads, with alpha beside each module, and the rest."""
    tensors = comfy.lora_convert.convert_lora(dict(lora.tensors))
    modules, others = by_module(tensors)
    known: dict[str, Any] = {}
    rest = {key: tensors[key] for key in others}
    for module, keys in modules.items():
        magnitude = "DoRA" in keys and not keys["DoRA"].endswith(".dora_scale")
        target = targets.get(module)
        is_parameter = isinstance(target, str) and not target.endswith(".weight")
        ours = target is None or is_parameter or magnitude or bool(_OURS & set(keys))
        (rest if ours else known).update({key: tensors[key] for key in keys.values()})
        if not ours and "alpha" not in keys and "down" in keys:
            rank = tensors[keys["down"]].shape[0]
            scale = lora.alphas.scale(module, rank, None)
            if scale != 1.0:
                known[f"{module}.alpha"] = torch.tensor(scale * rank)
    return known, rest


class _Read(dict[str, Any]):
    """A file for ComfyUI's loader, which remembers the keys that were taken."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        super().__init__(tensors)
        self.taken = set[str]()

    def __getitem__(self, key: str) -> Any:
        self.taken.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self.__getitem__(key) if key in self else default


def _loaded(known: Mapping[str, Any], targets: Mapping[str, Any], what: str) -> tuple[Patches, list[str]]:
    """What ComfyUI's loader makes of a file, and the keys that it made nothing of."""
    file = _Read(known)
    try:
        patches = comfy.lora.load_lora(file, targets, log_missing=False)
    except KeyError as error:
        raise NodeError(f"{what}: {error} is missing beside its other half: an incomplete file, get it again") from None
    used = {*patches, *(key[0] for key in patches if not isinstance(key, str))}
    left_out = []
    for module, keys in by_module(known)[0].items():
        target = targets[module]
        weight = target if isinstance(target, str) else target[0]
        any_used = weight in used or f"{weight.removesuffix('.weight')}.bias" in used
        alone = {f"{module}.b_norm"} if f"{module}.w_norm" not in file else set()  # is taken, and nothing made of it
        left_out += [key for key in keys.values() if not any_used or key not in file.taken - alone]
    return patches, left_out


def _why(lora: Lora, model: Any) -> str:
    """Why nothing of a file fits: another base only where the names of both say so."""
    example = next(iter(lora.tensors), None)
    if example is None:
        return ": the file has none"
    found = family_of_lora(list(by_module(lora.tensors)[0]))
    own = family_of_lora([name.rpartition(".")[0] for name in model.model.diffusion_model.state_dict()])
    if found is not None and own is not None and found is not own:
        return f": the LoRA is for {found.title}, this MODEL is a {own.title}"
    text = " (a text encoder's, which this node does not patch)" if example.startswith(("lora_te", "text_enc")) else ""
    return f", they look like {example!r}{text}: a LoRA for another part or model, or in a layout that is not known"


def _with_place(
    rest: Mapping[str, Any], names: ModuleNames, targets: Mapping[str, Any], model: Any
) -> tuple[dict[str, Any], list[str]]:
    """Part a file into what the network has modules for, whatever is done to them, and the keys of others."""
    weights = model.model.state_dict()
    absent: list[str] = []
    for module, keys in by_module(rest)[0].items():
        place = names.place(module)
        if place is None or place.is_parameter:
            continue
        native = [f"diffusion_model.{names.native_weight(f'{name}.weight')}" for name in place.names]
        if not any(name in weights or name.removesuffix(".weight") in targets for name in native):
            absent += keys.values()
    return {key: value for key, value in rest.items() if key not in absent}, absent


def _patches(
    file: LoraFile, names: ModuleNames, targets: Mapping[str, Any], model: Any
) -> tuple[Patches, Patches, list[str]]:
    """Products and differences as ComfyUI patches them, and the keys whose weights the network does not have."""
    weights = model.model.state_dict()
    lora: dict[str, Any] = {}
    differences: Patches = {}
    left_out: list[str] = []
    native_names: Callable[[str], str | None] = names.native_weight
    if names.layout is not None:  # joined files have the native names
        before, file, native_names = len(file.left_out), joined(file, names.layout), str
        left_out += file.left_out[before:]
    for name, changes in file.weights.items():
        native = f"diffusion_model.{native_names(name)}"
        module = native.removesuffix(".weight")
        target = targets.get(module, native if native in weights else None)
        if target is None:
            left_out += file.keys[name]
            continue
        products = [change for change in changes if isinstance(change, LowRank)]
        if products:
            product = sum_of(products)
            down, up = product.factors()
            lora |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
            lora[f"{module}.alpha"] = torch.tensor(product.scale * down.shape[0])
        plain = [change.dense() for change in changes if not isinstance(change, LowRank)]
        if plain:
            shape = weights[target].shape if isinstance(target, str) else plain[0].shape
            value = torch.stack(plain).sum(0)
            fits = [side for side in shape if side != 1] == [side for side in value.shape if side != 1]
            differences[target] = ("diff", (value.reshape(shape) if fits else value,))
    return comfy.lora.load_lora(lora, targets, log_missing=False), differences, left_out


def _is_table(model: Any, key: Any) -> bool:
    """Whether a weight is a parameter beside modules, such as Wan's modulation, which ComfyUI never patches."""
    if not isinstance(key, str):
        return False
    owner = model.model.get_submodule(key.rpartition(".")[0])
    return any("." in name for name, _ in owner.named_parameters())


def _check_shapes(model: Any, patches: Mapping[Any, Any], what: str) -> None:
    """Refuse a change of another shape, which ComfyUI would log and go on without."""
    weights = model.model.state_dict()
    for target, patch in patches.items():
        key, part = (target, None) if isinstance(target, str) else (target[0], target[1])
        weight = weights.get(key)
        if weight is None or weight.dtype not in _EXACT:
            continue
        if part is not None:  # one of several projections that lie in one weight
            weight = weight.narrow(*part)
        if isinstance(patch, comfy.weight_adapter.LoRAAdapter):
            up, down, _, middle, _, reshape = patch.weights
            found: tuple[int, ...] = (up.flatten(1).shape[0], down.flatten(1).shape[1])
            expected = (weight.shape[0], weight[0].numel())
            if middle is not None or reshape is not None:
                continue
        elif isinstance(patch, tuple) and patch[0] == "diff":
            found, expected = tuple(patch[1][0].shape), tuple(weight.shape)
        else:
            continue
        if found != expected:
            sizes = ["x".join(map(str, shape)) for shape in (expected, found)]
            raise NodeError(
                f"{what}: {key} is {sizes[0]} in this MODEL and {sizes[1]} in the LoRA: a LoRA for a network of "
                "another size"
            )

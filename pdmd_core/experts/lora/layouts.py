"""LoRA files written in the layout of one's choice: native, kohya, diffusers or PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ...families import ModuleNames
from .changes import Change, LowRank, sum_of
from .file import LoraFile
from .joined import joined

if TYPE_CHECKING:
    from torch import Tensor

LAYOUTS = {
    "native": "original names, lora_down, lora_up and alpha: ComfyUI reads it, and diffusers for most models",
    "kohya": "original names with underscores for dots: ComfyUI, and diffusers for some models",
    "diffusers": "diffusers' names for its load_lora_weights, alpha in the weights",
    "peft": "a folder for PEFT's PeftModel: diffusers' names, alpha in adapter_config.json",
}
"""Name of a layout to what it is and who reads it."""


@dataclass
class Written:
    """A LoRA file in another layout."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """The tensors by the keys of the layout."""
    config: dict[str, object] | None = None
    """What lies beside it as ``adapter_config.json``, for PEFT."""
    left_out: list[str] = field(default_factory=list)
    """Keys of the file that was read whose changes have no place in this layout."""


def in_layout(file: LoraFile, names: ModuleNames, layout: str) -> Written:
    """Write a LoRA file in a layout.

    Args:
        file: What it changes.
        names: The names of its family.
        layout: One of ``LAYOUTS``.

    Returns:
        The tensors, and what could not be written. Every product is exact: where alpha is put into a projection and
        that does not fit its dtype, it becomes float32.
    """
    native = layout in ("native", "kohya")
    file = joined(file, names.layout) if native and names.layout is not None else file
    written = Written(left_out=list(file.left_out))
    spell = _native_name(names) if native else _own_name
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, changes in file.weights.items():
        products = [change for change in changes if isinstance(change, LowRank)]
        module = name.removesuffix(".weight")
        placed = spell(name, layout)
        if products and placed is not None:
            product = sum_of(products)
            if product.scale < 0 and layout != "diffusers":  # alpha is positive
                product = LowRank(product.down, -product.up, -product.scale)
            _write_product(written.tensors, placed, product, layout)
            ranks[module] = product.down.shape[0]
            alphas[module] = product.scale * product.down.shape[0]
        differences = [change for change in changes if not isinstance(change, LowRank)]
        suffix = _difference_key(placed, name, layout) if placed is not None else None
        if differences and suffix is not None:
            written.tensors[suffix] = _total(differences)
        if placed is None or (differences and suffix is None):
            written.left_out += file.keys[name]
    if layout == "peft":
        written.config = _peft_config(ranks, alphas)
    written.left_out = list(dict.fromkeys(written.left_out))
    return written


def _native_name(names: ModuleNames) -> Callable[[str, str], str | None]:
    """Module, or parameter, under its native name with the layout's prefix."""

    def spell(weight: str, layout: str) -> str | None:
        native = weight if names.layout is not None else names.native_weight(weight)
        if native is None:
            return None
        module = native.removesuffix(".weight").removesuffix(".bias")
        if layout == "native":
            return names.prefix + module
        return names.flat_prefix + module.replace(".", "_")

    return spell


def _own_name(weight: str, layout: str) -> str | None:
    prefix = "transformer." if layout == "diffusers" else "base_model.model."
    return prefix + weight.removesuffix(".weight").removesuffix(".bias")


def _write_product(tensors: dict[str, Tensor], module: str, product: LowRank, layout: str) -> None:
    down, up = product.factors()
    if layout in ("native", "kohya"):
        tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        tensors[f"{module}.alpha"] = torch.tensor(product.scale * down.shape[0])
        return
    if layout == "diffusers" and product.scale != 1.0:
        scaled = (product.scale * up.float()).to(up.dtype)
        exact = torch.equal(scaled.float(), product.scale * up.float())
        up = scaled if exact else product.scale * up.float()
        down = down.to(up.dtype)
    tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}


def _difference_key(module: str, weight: str, layout: str) -> str | None:
    """The key of a plain difference, where the layout has one."""
    kind = weight.rpartition(".")[2]
    if layout in ("native", "kohya") and kind in ("weight", "bias"):
        return f"{module}.{'diff' if kind == 'weight' else 'diff_b'}"
    if layout == "native":
        stem = module.removesuffix(".modulation")
        return f"{stem}.diff_m" if stem != module else f"{module}.diff"
    return None


def _total(changes: Sequence[Change]) -> Tensor:
    if len(changes) == 1 and not isinstance(changes[0], LowRank) and changes[0].scale == 1.0:
        return changes[0].value
    return torch.stack([change.dense() for change in changes]).sum(0)


def _peft_config(ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, object]:
    """Settings by which PEFT makes the adapter: rank and alpha of most modules, and those of the others."""
    rank = max(set(ranks.values()), key=list(ranks.values()).count) if ranks else 1
    alpha = max(set(alphas.values()), key=list(alphas.values()).count) if alphas else rank
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {f"^{module}": r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{module}": a for module, a in alphas.items() if a != alpha},
        "bias": "none",
        "lora_dropout": 0.0,
    }

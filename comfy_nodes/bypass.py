"""LoRA experts beside the weights of their base, which stay as they are when the expert changes.

A merged LoRA is part of the weights: at a switch ComfyUI takes the base back and computes its weights anew. Beside them
``y = W x + scale * up (down x)`` is computed in each layer, and a switch exchanges the small products alone. ComfyUI's
own bypass loader (``comfy/weight_adapter/bypass.py``) has no products of parts of a weight, which joined projections
need, and is not in 0.3.75.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.weight_adapter
import torch
from comfy.patcher_extension import PatcherInjection, WrappersMP
from torch import nn

from .errors import NodeError

KEY = "phased_dmd"
"""The key of the injection of a MODEL."""
BESIDE = "beside"
LORA_WEIGHTS = ["merged", BESIDE]
"""Where the weights of LoRA experts are; the first is the default."""


@dataclass(frozen=True)
class Product:
    """``up @ down`` beside a linear layer, or a part of its rows."""

    module: str
    """The layer in the MODEL."""
    down: torch.Tensor
    """Of shape (rank, in)."""
    up: torch.Tensor
    """Of shape (rows, rank), with all factors in it."""
    first: int | None = None
    """The first of the rows, where the layer has others."""


class _Addition:
    """A forward hook of a layer, with its product on the device of the input."""

    def __init__(self, product: Product) -> None:
        self._product = product
        self._moved: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        if self._moved is None or self._moved[0].device != x.device or self._moved[0].dtype != x.dtype:
            self._moved = self._product.down.to(x.device, x.dtype), self._product.up.to(x.device, x.dtype)
        added = nn.functional.linear(nn.functional.linear(x, self._moved[0]), self._moved[1])
        first = self._product.first
        if first is None:
            return output + added
        rows = output.narrow(-1, first, added.shape[-1])
        return torch.cat([output[..., :first], rows + added, output[..., first + added.shape[-1] :]], dim=-1)


class _Beside(PatcherInjection):
    """The products of one expert on the layers of its network, while it is the loaded one."""

    def __init__(self, products: Sequence[Product]) -> None:
        super().__init__(inject=self._add, eject=self._remove)
        self.weights = {f"{product.module}.weight" for product in products}
        self._products, self._hooks = products, list[Any]()

    def _add(self, patcher: Any) -> None:
        if not self._hooks:
            for product in self._products:
                layer = patcher.model.get_submodule(product.module)
                self._hooks.append(layer.register_forward_hook(_Addition(product)))

    def _remove(self, patcher: Any) -> None:
        while self._hooks:
            self._hooks.pop().remove()


def split(patches: Mapping[Any, Any], model: Any, strength: float) -> tuple[list[Product], dict[Any, Any]]:
    """Part patches into products that can be beside their layers, and the rest.

    Args:
        patches: Weight, or weight and part of it, to what ComfyUI patches it with.
        model: The MODEL.
        strength: The strength.

    Returns:
        The products, and patches that must be merged: plain differences, convolutions, DoRA.
    """
    products: list[Product] = []
    rest: dict[Any, Any] = {}
    for key, patch in patches.items():
        target, part, *others = (key, None) if isinstance(key, str) else key
        module = target.removesuffix(".weight")
        whole = isinstance(patch, comfy.weight_adapter.LoRAAdapter) and target.endswith(".weight") and not any(others)
        if not whole or (part and part[0]) or not _is_linear(model.model.get_submodule(module)):
            rest[key] = patch
            continue
        up, down, alpha, middle, magnitude, reshape = patch.weights
        if up.ndim != 2 or down.ndim != 2 or any(each is not None for each in (middle, magnitude, reshape)):
            rest[key] = patch
            continue
        scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
        products.append(Product(module, down, scale * up.float(), part[1] if part else None))
    return products, rest


def _is_linear(layer: nn.Module) -> bool:
    """Also ComfyUI's layers of quantised weights, which are no ``nn.Linear``."""
    return isinstance(layer, nn.Linear) or (hasattr(layer, "in_features") and hasattr(layer, "out_features"))


def put_beside(model: Any, products: Sequence[Product]) -> None:
    """Let a MODEL have products beside its layers while it is loaded."""
    model.set_injections(KEY, [_Beside(products)])


def take_away(patcher: Any) -> None:
    """Take products off the layers when a run ends: whoever loads the base next finds it as it is."""
    for injection in _of(patcher):
        injection.eject(patcher)


def refuse_what_needs_merged(patchers: Sequence[Any], carrier: Any, before: Mapping[str, Sequence[Any]]) -> None:
    """Refuse what would do something else to weights with a LoRA in them than to those without.

    Args:
        patchers: The experts as they run.
        carrier: The composed MODEL.
        before: Its patches when it was composed.

    Raises:
        NodeError: If modules are compiled, which would go on with the products of the first expert, or if whole
            weights are changed: by a merge of MODELs, a wrapper of weights, DoRA.
    """
    weights = {weight for patcher in patchers for injection in _of(patcher) for weight in injection.weights}
    if not weights:
        return
    if any(patcher.wrappers.get(WrappersMP.APPLY_MODEL, {}).get("torch.compile") for patcher in patchers):
        raise NodeError(
            "set lora_weights to merged, or take TorchCompileModel out: compiled modules do not see that LoRA experts "
            "beside the weights change"
        )
    for weight in sorted(weights):
        new = carrier.patches.get(weight, ())[len(before.get(weight, ())) :]
        wrapped = any(weight in getattr(patcher, "weight_wrapper_patches", {}) for patcher in patchers)
        if wrapped or not all(map(_is_added, new)):
            raise NodeError(
                f"set lora_weights to merged: what is on this MODEL changes {weight} as a whole (a merge of MODELs, "
                "say), and LoRA experts beside the weights are no part of it"
            )


def _is_added(entry: Sequence[Any]) -> bool:
    """Whether a patch only adds to a weight, whatever the weight is."""
    _, patch, strength_of_weight, _, function = entry
    if strength_of_weight != 1.0 or function is not None:
        return False
    if isinstance(patch, tuple):
        return len(patch) == 1 or patch[0] == "diff"
    adapters = comfy.weight_adapter
    if isinstance(patch, adapters.LoRAAdapter):
        return patch.weights[4] is None
    return isinstance(patch, adapters.LoHaAdapter | adapters.LoKrAdapter) and patch.weights[-1] is None


def _of(patcher: Any) -> Sequence[Any]:
    found: Sequence[Any] = getattr(patcher, "injections", {}).get(KEY, ())
    return found

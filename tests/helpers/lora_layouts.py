"""LoRA files as other projects release them, with random weights, and the explicit changes that they mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pdmd_core.families import ModelFamily
from tests.helpers.tiny import randn

RANK = 4
Deltas = dict[str, Tensor]
"""Name of a weight in diffusers to what is added to it."""
Pairs = dict[str, tuple[Tensor, Tensor]]
"""Module in diffusers to its projections to and from the rank."""


@torch.no_grad()
def added(network: nn.Module, deltas: Deltas, strength: float = 1.0) -> nn.Module:
    """The network with these changes; those of weights that it does not have are left out."""
    for name, parameter in network.named_parameters():
        if name in deltas:
            parameter += strength * deltas[name].reshape(parameter.shape)
    return network


def with_native_names(family: ModelFamily, pairs: Pairs) -> Pairs:
    """Without those of which a file does not tell the order of rows in the native layout."""
    layout = family.lora_names.layout
    unclear = tuple(layout.swapped_in_last) if layout else ()
    return {name: pair for name, pair in pairs.items() if not name.endswith(unclear)}


def pairs_of(network: nn.Module, seed: int, ends: tuple[str, ...] = ("",), rank: int = RANK) -> Pairs:
    """Random projections for the linear layers whose names have these ends."""
    found = {}
    for n, (name, module) in enumerate(network.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(ends):
            down = 0.3 * randn(rank, module.in_features, seed=1000 * seed + n)
            found[name] = (down, 0.3 * randn(module.out_features, rank, seed=1000 * seed + n + 500))
    return found


def deltas_of(pairs: Pairs, scale: float = 1.0) -> Deltas:
    """What pairs mean at a scale of alpha / rank."""
    return {f"{name}.weight": scale * up @ down for name, (down, up) in pairs.items()}


def _native(family: ModelFamily, name: str) -> str:
    native = family.lora_names.native(name)
    assert native is not None, name
    return native


def _joined(family: ModelFamily, pairs: Pairs) -> dict[str, tuple[Tensor, Tensor]]:
    """Native module to projections, where it has several of diffusers': one below the other, and on the diagonal."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    layout = family.lora_names.layout
    for name, pair in pairs.items():
        if layout is None:
            found[_native(family, name)] = pair
            continue
        native = layout.find(f"{name}.weight")
        assert native is not None, name
        parts = [pairs[source.removesuffix(".weight")] for source in native.sources]
        down, up = torch.cat([part[0] for part in parts]), torch.block_diag(*(part[1] for part in parts))
        found[native.name.removesuffix(".weight")] = down, torch.cat(up.chunk(2)[::-1]) if native.swapped else up
    return found


def _keys(pairs: Pairs, spell: Callable[[str], str], down: str, up: str) -> dict[str, Tensor]:
    return {
        f"{spell(name)}.{part}": value.clone()
        for name, both in pairs.items()
        for part, value in zip((down, up), both, strict=True)
    }


_AB = ("lora_A.weight", "lora_B.weight")
_DOWN_UP = ("lora_down.weight", "lora_up.weight")
LAYOUTS: dict[str, Callable[[ModelFamily, Pairs], dict[str, Tensor]]] = {
    "native": lambda f, p: _keys(_joined(f, p), lambda n: f"diffusion_model.{n}", *_DOWN_UP),
    "native_ab": lambda f, p: _keys(_joined(f, p), lambda n: f"diffusion_model.{n}", *_AB),
    "kohya": lambda f, p: _keys(_joined(f, p), lambda n: "lora_unet_" + n.replace(".", "_"), *_DOWN_UP),
    "kohya_double": lambda f, p: _keys(_joined(f, p), lambda n: "lora_unet__" + n.replace(".", "_"), *_DOWN_UP),
    "diffusers": lambda f, p: _keys(p, lambda n: f"transformer.{n}", *_AB),
    "peft": lambda f, p: _keys(p, lambda n: f"base_model.model.{n}", *_AB),
    "bare_native": lambda f, p: _keys(_joined(f, p), lambda n: n, *_DOWN_UP),
    "bare_diffusers": lambda f, p: _keys(p, lambda n: n, *_AB),
    "diffsynth": lambda f, p: _keys(_joined(f, p), lambda n: n, "lora_A.default.weight", "lora_B.default.weight"),
    "dotted": lambda f, p: _keys(p, lambda n: f"transformer.{n}", "lora.down.weight", "lora.up.weight"),
}
"""Name of a layout to what writes pairs in it, without alpha."""


def with_alpha(tensors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """An alpha beside each module, which means the same where products are joined to one of a higher rank."""
    found = dict(tensors)
    for key, value in tensors.items():
        stem, half, _ = key.rpartition(".lora")
        if half and key.removeprefix(stem).startswith((".lora_A", ".lora_down", ".lora.down")):
            found[f"{stem}.alpha"] = torch.tensor(alpha * len(value) / RANK)
    return found


def wan_of_2026(
    network: nn.Module, family: ModelFamily, seed: int, alpha: float = 2.0
) -> tuple[dict[str, Tensor], Deltas]:
    """Every kind of key that lightx2v's distilled LoRA files have since 1022, and what they mean.

    Pairs on all linear layers, in the blocks and outside, each with alpha; ``.diff`` of norms and of the convolution,
    ``.diff_b`` of all biases, ``.diff_m`` of the modulation.
    """
    pairs = pairs_of(network, seed)
    deltas = deltas_of(pairs, alpha / RANK)
    tensors = with_alpha(LAYOUTS["native"](family, pairs), alpha)
    for n, (name, value) in enumerate(network.named_parameters()):
        module, _, kind = name.rpartition(".")
        change = 0.1 * randn(*value.shape, seed=7000 * seed + n)
        if kind == "bias":
            key = f"{_native(family, module)}.diff_b"
        elif kind == "scale_shift_table":
            key = f"{module}.diff_m".removeprefix(".") if module else "head.diff_m"
        elif kind == "weight" and module not in pairs:
            key = f"{_native(family, module)}.diff"
        else:
            continue
        tensors[f"diffusion_model.{key}"] = change
        deltas[name] = change
    return tensors, deltas


def save(path: Path, tensors: dict[str, Tensor], **metadata: object) -> Path:
    """Write a LoRA file; metadata that are no texts become JSON."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path, metadata=texts or None)
    return path

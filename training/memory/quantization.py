"""Frozen networks with the matrices of their blocks in 8 bits (torchao) or in 4 (NF4 of bitsandbytes)."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any, Literal

from torch import nn

from pdmd_core.families import ModelFamily
from training.config.command_line import UserError

Quantization = Literal["none", "int8", "float8", "nf4"]
BYTES = {"int8": 1.0, "float8": 1.0, "nf4": 0.5 + 1 / 64}
"""Of a number. NF4 has a scale of 8 bits for each 64 of them; the scales of whole rows are not counted."""


def quantize(networks: Iterable[nn.Module], family: ModelFamily, kind: Quantization) -> None:
    """Weights only: what is computed stays in the dtype of the weights. Raises UserError where a package is missing."""
    config = library_config(kind)
    if config is None:
        return
    for block in (block for network in networks for block in family.blocks_of(network)):
        if kind == "nf4":
            _in_4_bits(block, config)
        else:
            from torchao.quantization import quantize_

            quantize_(block, config)


def library_config(kind: Quantization) -> Any:
    """What torchao is told, or the layers of bitsandbytes; None for none. Raises UserError where one is missing."""
    if kind == "none":
        return None
    if kind == "nf4":
        try:
            return import_module("bitsandbytes").nn
        except ImportError as error:
            raise UserError(
                f"quantization nf4 takes the package bitsandbytes ({error}): pip install 'phased-dmd[low-memory]', "
                "or use int8"
            ) from None
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise UserError(
            f"quantization {kind} takes the package torchao ({error}): pip install 'phased-dmd[low-memory]', or "
            "use none"
        ) from None
    return Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()


def _in_4_bits(block: nn.Module, layers: Any) -> None:
    """Replace the linear layers of a block by those of bitsandbytes, on the same device."""
    for name, module in [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear)]:
        weight, bias = module.weight, module.bias
        new = layers.Linear4bit(
            module.in_features, module.out_features, False, compute_dtype=weight.dtype, device="meta"
        )
        new.weight = layers.Params4bit(weight.detach(), requires_grad=False, quant_type="nf4", module=new)
        new.bias = bias
        new.support_avx512bf16_for_cpu = False  # that repacks the weights in place, and passes on no gradient
        parent, _, last = name.rpartition(".")
        setattr(block.get_submodule(parent), last, new.to(weight.device))


def quantized_numbers(network: nn.Module, family: ModelFamily) -> int:
    """How many of a network's numbers are in fewer bits once it is quantized: its blocks' matrices, no adapters."""
    named = {m: name for block in family.blocks_of(network) for name, m in block.named_modules()}
    linear = [m for m, name in named.items() if isinstance(m, nn.Linear) and ".lora_" not in name]
    return sum(module.weight.numel() for module in linear)

"""Frozen networks with the matrices of their blocks in 8 bits (torchao): half the memory of bfloat16."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from pdmd_core.families import ModelFamily
from training.config.command_line import UserError

Quantization = Literal["none", "int8", "float8"]


def quantize(networks: Iterable[nn.Module], family: ModelFamily, kind: Quantization) -> None:
    """Weights only: what is computed stays in the dtype of the inputs. Raises UserError where torchao is missing."""
    config = library_config(kind)
    if config is None:
        return
    from torchao.quantization import quantize_

    for network in networks:
        for block in family.blocks_of(network):
            quantize_(block, config)


def library_config(kind: Quantization) -> Any:
    """What torchao is told; None for none. Raises UserError where torchao is missing."""
    if kind == "none":
        return None
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise UserError(
            f"quantization {kind} takes the package torchao ({error}): pip install 'phased-dmd[low-memory]', or "
            "use none"
        ) from None
    return Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()


def quantized_numbers(network: nn.Module, family: ModelFamily) -> int:
    """How many of a network's numbers are in 8 bits once it is quantized: the matrices of its blocks."""
    linear = {m for block in family.blocks_of(network) for m in block.modules() if isinstance(m, nn.Linear)}
    return sum(module.weight.numel() for module in linear)

"""Whole networks in the layout of the original code, which ComfyUI loads."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from ...families import ModelFamily
from ..format.header import TensorSpec
from ..format.weights import Weights


def in_native_layout(weights: Weights, family: ModelFamily) -> Weights:
    """Rename the weights of a network and join those that are one in the native layout; every number stays.

    Args:
        weights: All weights of the network, by their names in diffusers.
        family: The family of the network.

    Returns:
        The native weights, which are joined when they are read.

    Raises:
        ValueError: If a weight has no counterpart there.
    """
    found = {native.name: native for native in family.native_weights(weights.specs)}
    if sum(len(native.sources) for native in found.values()) != len(weights.specs):
        raise ValueError("two weights would get one name")
    specs = {}
    for name, native in found.items():
        parts = [weights.specs[source] for source in native.sources]
        dtype = reduce(torch.promote_types, (part.dtype for part in parts)) if len(parts) > 1 else parts[0].dtype
        rows = [sum(part.shape[0] for part in parts)] if len(parts) > 1 else [*parts[0].shape[:1]]
        specs[name] = TensorSpec(dtype, (*rows, *parts[0].shape[1:]))

    def read(name: str) -> Tensor:
        native = found[name]
        parts = [weights.read(source) for source in native.sources]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        return torch.cat(value.chunk(2)[::-1]) if native.swapped else value

    return Weights(specs, read)

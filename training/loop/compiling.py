"""Regional torch.compile: each repeated block of a network, once for all of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pdmd_core.families import ModelFamily

GRAPHS = 64
"""How many graphs of a block may be kept: one for each role, with and without gradient, and for changing batches."""


def compile_blocks(networks: Iterable[nn.Module], family: ModelFamily) -> None:
    """Compile the blocks of diffusers networks when they are first called."""
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for network in networks:
        for block in family.blocks_of(network):
            block.compile()

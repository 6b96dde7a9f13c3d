"""Regional torch.compile: each repeated block of a network, once for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

GRAPHS = 64
"""How many graphs of a block may be kept: one for each role, with and without gradient, and for changing batches."""


def compile_blocks(networks: Iterable[Any]) -> None:
    """Compile the blocks of diffusers networks when they are first called."""
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for network in networks:
        network.compile_repeated_blocks()

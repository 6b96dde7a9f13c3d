"""Regional torch.compile: each repeated block of a network, once for all of them, or not at all where that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pdmd_core.families import ModelFamily
from training.monitoring.monitor import warn

BACKEND = "inductor"
GRAPHS = 64
"""How many graphs of a block may be kept: one for each role, with and without gradient, and for changing batches."""
_COMPILERS = ("torch._dynamo.", "torch._inductor.", "torch._functorch.", "triton.")
"""Where exceptions come from that are not the network's own."""


def compile_blocks(networks: Iterable[nn.Module], family: ModelFamily) -> None:
    """Compile the blocks of diffusers networks when they are first called.

    Only what a block computes is compiled. What is put around it then (shards that are gathered, weights that come from
    host memory, samples that are divided) runs as it is.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    # What cannot be compiled backwards is known forwards, where the block can still run as it is.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    kinds: dict[type[nn.Module], _Kind] = {}
    for network in networks:
        for block in family.blocks_of(network):
            kind = kinds.setdefault(type(block), _Kind(type(block)))
            block.forward = _Forward(block, kind)


class _Kind:
    """Blocks of one class, which share their graphs.

    Attributes:
        ways: To run one, the best first: as one graph, in pieces, as it is.
        best: Which of them is not known to fail.
    """

    def __init__(self, kind: type[nn.Module]) -> None:
        self.name = kind.__name__
        forward: Callable[..., Any] = kind.forward
        whole, parts = (torch.compile(forward, backend=BACKEND, fullgraph=whole) for whole in (True, False))
        self.ways = (whole, parts, forward)
        self.best = 0

    def fails(self, way: int, error: Exception) -> int:
        """Which way is tried after one that failed; why is said once."""
        following = way + 1 if isinstance(error, torch._dynamo.exc.Unsupported) else len(self.ways) - 1
        if following > self.best:
            self.best = following
            how = "is compiled in pieces" if following < len(self.ways) - 1 else "runs as it is, which is slower"
            text = " ".join(str(error).split())[:200]
            warn(f"compile: {self.name} {how}: {type(error).__name__}: {text}")
        return self.best


class _Forward:
    """The forward pass of a block.

    One that ran in some way stays with it when another fails: gradient checkpointing runs it again as it ran.
    """

    def __init__(self, block: nn.Module, kind: _Kind) -> None:
        self.block, self.kind = block, kind
        self.way: int | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        way = self.kind.best if self.way is None else self.way
        while True:
            try:
                found = self.kind.ways[way](self.block, *args, **kwargs)
            except Exception as error:
                if way == len(self.kind.ways) - 1 or not f"{type(error).__module__}.".startswith(_COMPILERS):
                    raise
                way = self.kind.fails(way, error)
            else:
                self.way = way
                return found

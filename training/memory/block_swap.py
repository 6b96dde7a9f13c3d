"""Block swap: frozen weights of blocks wait in host memory, and pass through places for two blocks on the device.

Nothing is copied back, since nothing of it changes. A block's weights come while another computes: forwards those of
the next one; in a backward pass, where gradient checkpointing runs each block again, the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pdmd_core.roles import Roles
from training.memory.host_memory import HostCopy, flat_bytes, host_buffer


class BlockRing:
    """Two places on a device through which the weights of blocks pass.

    Args:
        networks: For each network the weights of its blocks, block by block in the order in which they run.
        device: Where they compute.
    """

    def __init__(self, networks: Sequence[Sequence[Sequence[Tensor]]], device: torch.device) -> None:
        self.device = device
        self.home: list[HostCopy] = []
        self.ends: list[range] = []
        """The indices of the blocks of the network of each block."""
        for blocks in networks:
            sizes = [flat_bytes(tensors) for tensors in blocks]
            parts = host_buffer(sum(sizes), device).split(sizes)
            first = len(self.home)
            self.home += [HostCopy(tensors, flat) for tensors, flat in zip(blocks, parts, strict=True)]
            self.ends += [range(first, len(self.home))] * len(blocks)
        largest = max(copy.flat.numel() for copy in self.home)
        self.places = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self.held: list[int | None] = [None, None]
        """Index of the block whose weights are in each place, or come there."""
        self.runs: int | None = None
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._came: list[Any] = [None, None]

    def use(self, index: int) -> None:
        """The block with this index is about to run: its weights are there, and those of the next one begin to come."""
        before, self.runs = self.runs, index
        place = self._bring(index, other_than=before)
        if self._came[place] is not None:
            torch.cuda.current_stream(self.device).wait_event(self._came[place])
        copy = self.home[index]
        copy.place(copy.views_of(self.places[place]))
        following = self._after(index, before)
        if following is not None:
            self._bring(following, other_than=index)

    def _after(self, index: int, before: int | None) -> int | None:
        """What probably runs after a block that runs after another one."""
        blocks = self.ends[index]
        if before in (index, index + 1):  # run again, for the backward pass
            return index - 1 if index - 1 in blocks else None
        if index + 1 in blocks:
            return index + 1
        return None if torch.is_grad_enabled() else blocks[0]  # with gradient it runs again

    def _bring(self, index: int, other_than: int | None) -> int:
        """Let the weights of a block come, if they are not there, into the place that does not hold another block."""
        if index in self.held:
            return self.held.index(index)
        place = 1 if self.held[0] == other_than else 0
        gone = self.held[place]
        if gone is not None:
            self.home[gone].place(self.home[gone].views)
        self.held[place] = index
        flat = self.home[index].flat
        target = self.places[place][: flat.numel()]
        if self._stream is None:
            target.copy_(flat)
            return place
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # what computes with the weights that go
        with torch.cuda.stream(self._stream):
            target.copy_(flat, non_blocking=True)
            self._came[place] = self._stream.record_event()
        return place


def swapped_blocks(roles: Roles, count: int) -> list[list[list[Tensor]]]:
    """For each network of the teacher, the frozen weights of its last blocks.

    Args:
        roles: The networks.
        count: How many blocks of each; all of them where there are fewer.
    """
    own = {id(parameter) for role in roles.specs for parameter in roles.parameters(role)}
    return [
        [[p for p in block.parameters() if id(p) not in own] for block in roles.family.blocks_of(network)[-count:]]
        for network in roles.bases.values()
    ]


def swap_blocks(roles: Roles, count: int, device: torch.device) -> BlockRing:
    """With networks that are on the CPU: the last blocks of the teacher's wait there, everything else goes to a device.

    Args:
        roles: The networks. Weights that train in a block must be recomputed with it (gradient checkpointing).
        count: How many blocks of each network of the teacher.
        device: Where they compute.

    Returns:
        What brings the blocks.
    """
    weights = swapped_blocks(roles, count)
    waiting = {id(tensor) for blocks in weights for tensors in blocks for tensor in tensors}
    for network in roles.networks():
        for tensor in [*network.parameters(), *network.buffers()]:
            if id(tensor) not in waiting:
                tensor.data = tensor.data.to(device)
    ring = BlockRing(weights, device)
    index = 0
    for network in roles.bases.values():
        for block in roles.family.blocks_of(network)[-count:]:
            block.register_forward_pre_hook(partial(_use, ring, index))
            index += 1
    return ring


def _use(ring: BlockRing, index: int, block: nn.Module, inputs: object) -> None:
    ring.use(index)

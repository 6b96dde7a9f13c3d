"""The idle network of a two-network teacher off the device: only the one that a sigma needs is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pdmd_core.roles import Roles


class OneNetworkOnDevice:
    """Frozen weights of several networks, kept on the CPU; calling it with a network's name brings that one's over.

    Being frozen, weights are never copied back. What trains stays where it is. Before a graph is run backwards its
    network must be brought back; without gradient checkpointing the graph itself would keep the weights on the device.
    """

    def __init__(self, frozen: Mapping[str, Sequence[Tensor]], device: torch.device) -> None:
        self.device = device
        self.here: str | None = None
        self.frozen = frozen
        self.at_home = {name: [_pinned(t.data, device) for t in tensors] for name, tensors in frozen.items()}
        for name in frozen:
            self._send_home(name)

    def __call__(self, name: str) -> None:
        """The network of this name is about to run."""
        if name == self.here:
            return
        if self.here is not None:
            self._send_home(self.here)
        self._bring(name)
        self.here = name

    def _bring(self, name: str) -> None:
        for tensor, home in zip(self.frozen[name], self.at_home[name], strict=True):
            tensor.data = home.to(self.device, non_blocking=True)

    def _send_home(self, name: str) -> None:
        for tensor, home in zip(self.frozen[name], self.at_home[name], strict=True):
            tensor.data = home


def keep_one_network(roles: Roles, device: torch.device) -> None:
    """With networks that are on the CPU: adapters and full copies go to the device, the teacher's one at a time."""
    own = {p for role in roles.specs for p in roles.parameters(role)}
    for parameter in own:
        parameter.data = parameter.data.to(device)
    for network in roles.networks()[len(roles.bases) :]:
        network.to(device)
    frozen = {
        name: [*(p for p in network.parameters() if p not in own), *network.buffers()]
        for name, network in roles.bases.items()
    }
    roles.before_use = OneNetworkOnDevice(frozen, device)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor

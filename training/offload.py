"""What is idle off the device: the other network of a two-network teacher, the experts that do not train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pdmd_core.roles import FAKE, Roles


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
        _bring(self.frozen[name], self.at_home[name], self.device)

    def _send_home(self, name: str) -> None:
        _send_home(self.frozen[name], self.at_home[name])


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


class IdleExperts:
    """Experts that do not train, kept on the CPU; one is on the device only while it computes, in a rollout.

    They are frozen, so weights are never copied back. The expert that trains is put on the device. As they compute
    without gradient, no graph holds what was there.
    """

    def __init__(self, roles: Roles, trained: str, device: torch.device) -> None:
        self.device = device
        self.here: str | None = None
        self.idle = {role: roles.parameters(role) for role in roles.specs if role not in (trained, FAKE)}
        for parameter in roles.parameters(trained):
            parameter.data = parameter.data.to(device)
        self.at_home = {
            role: [_pinned(p.data.to("cpu"), device) for p in parameters] for role, parameters in self.idle.items()
        }
        for role in self.idle:
            self._send_home(role)

    def __call__(self, role: str) -> None:
        """This role is about to compute."""
        if role == self.here:
            return
        if self.here is not None:
            self._send_home(self.here)
            self.here = None
        if role in self.idle:
            self._bring(role)
            self.here = role

    def _bring(self, role: str) -> None:
        _bring(self.idle[role], self.at_home[role], self.device)

    def _send_home(self, role: str) -> None:
        _send_home(self.idle[role], self.at_home[role])


def keep_idle_experts_away(roles: Roles, trained: str, device: torch.device) -> None:
    """From now on, until another expert trains."""
    roles.before_role = IdleExperts(roles, trained, device)


def _bring(tensors: Sequence[Tensor], at_home: Sequence[Tensor], device: torch.device) -> None:
    for tensor, home in zip(tensors, at_home, strict=True):
        tensor.data = home.to(device, non_blocking=True)


def _send_home(tensors: Sequence[Tensor], at_home: Sequence[Tensor]) -> None:
    for tensor, home in zip(tensors, at_home, strict=True):
        tensor.data = home


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor

"""What is idle off the device: the other network of a two-network teacher, the experts that do not train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pdmd_core.phases import PhasePlan
from pdmd_core.roles import Roles
from training.memory.host_memory import HostCopy, flat_bytes, host_buffer


class OneOnDevice:
    """Frozen weights of several networks or experts, kept on the CPU; calling it with a name brings that one's over.

    Being frozen, weights are never copied back. A name that it does not keep, of what stays where it is, sends home the
    one that is over. Before a graph is run backwards its network must be brought back; without gradient checkpointing
    the graph itself would keep the weights on the device.
    """

    def __init__(self, kept: Mapping[str, Sequence[Tensor]], device: torch.device) -> None:
        self.device = device
        self.here: str | None = None
        self.kept = kept
        self.at_home = {name: _AtHome(tensors, device) for name, tensors in kept.items()}
        for name in kept:
            self._send_home(name)

    def __call__(self, name: str) -> None:
        """What has this name is about to run."""
        if name == self.here:
            return
        if self.here is not None:
            self._send_home(self.here)
            self.here = None
        if name in self.kept:
            self._bring(name)
            self.here = name

    def _bring(self, name: str) -> None:
        self.at_home[name].bring(self.device)

    def _send_home(self, name: str) -> None:
        self.at_home[name].send_home()


class _AtHome:
    """Tensors in host memory: in one flat buffer, but for those that consist of others (8-bit weights)."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        plain = [tensor for tensor in tensors if type(tensor.data) is Tensor]
        self.flat = HostCopy(plain, host_buffer(flat_bytes(plain), device))
        self.others = [(tensor, tensor.data.to("cpu")) for tensor in tensors if type(tensor.data) is not Tensor]

    def bring(self, device: torch.device) -> None:
        self.flat.place(self.flat.views_of(self.flat.flat.to(device, non_blocking=True)))
        for tensor, home in self.others:
            tensor.data = home.to(device, non_blocking=True)

    def send_home(self) -> None:
        self.flat.place(self.flat.views)
        for tensor, home in self.others:
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
    roles.before_use = OneOnDevice(frozen, device)


def keep_idle_experts_away(roles: Roles, plan: PhasePlan, phase: int, device: torch.device) -> None:
    """Until another expert trains, those that do not are on the device only while they compute, in a rollout.

    The expert that trains is put there. As the others compute without gradient, no graph holds what was there.
    """
    for parameter in roles.parameters(plan.phases[phase].name):
        parameter.data = parameter.data.to(device)
    idle = {other.name: roles.parameters(other.name) for k, other in enumerate(plan.phases) if k != phase}
    roles.before_role = OneOnDevice(idle, device)

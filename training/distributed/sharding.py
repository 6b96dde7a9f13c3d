"""Weights spread over processes (FSDP2): the frozen base and full copies in shards, adapters whole on every process.

``fsdp`` shards over all processes, ``hsdp`` inside groups of them that hold the same shards. An update computes what it
computes on one process: samples are divided, gradients averaged.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pdmd_core.role_weights import check_fits
from pdmd_core.roles import Roles
from training.config.schema import ConfigError, DistillConfig
from training.data.weight_files import WeightFiles


def check_processes(config: DistillConfig, processes: int) -> None:
    """Raises ConfigError when this many processes cannot divide the work."""
    together, groups = config.parallel.context_parallel, config.groups(processes)
    if processes % together:
        raise ConfigError(
            f"parallel.context_parallel: {processes} processes cannot be divided into groups of {together}"
        )
    if config.batch_size % groups:
        whom = f"{processes} processes" if together == 1 else f"{groups} groups of {together} processes"
        raise ConfigError(f"batch_size: {config.batch_size} samples cannot be divided among {whom}")
    if config.batch_size // groups % config.score_groups:
        raise ConfigError(
            f"score_groups: {config.batch_size // groups} samples of a process cannot be divided into "
            f"{config.score_groups} groups"
        )
    size = group_size(config, processes)
    if config.parallel.sharding == "hsdp" and processes > 1 and processes % size:
        raise ConfigError(f"parallel.shard_size: {processes} processes cannot be divided into groups of {size}")


def group_size(config: DistillConfig, processes: int) -> int:
    """How many processes share one set of weights."""
    if config.parallel.sharding == "hsdp":
        return config.parallel.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return processes if config.parallel.sharding == "fsdp" else 1


def mesh_of(config: DistillConfig, device: torch.device, processes: int) -> DeviceMesh | None:
    """The processes as the configuration divides them; None when every one holds all weights."""
    if config.parallel.sharding == "none" or processes == 1:
        return None
    if config.parallel.sharding == "fsdp":
        return init_device_mesh(device.type, (processes,), mesh_dim_names=("shard",))
    size = group_size(config, processes)
    return init_device_mesh(device.type, (processes // size, size), mesh_dim_names=("replicate", "shard"))


def shard_roles(
    roles: Roles,
    mesh: DeviceMesh,
    device: torch.device,
    compute: torch.dtype | None = None,
    files: WeightFiles | None = None,
) -> None:
    """Shard networks that are on the CPU, block by block; full copies that came empty become copies of the base.

    Args:
        roles: The networks.
        mesh: The processes that share their weights.
        device: Where shards go.
        compute: Full copies send their blocks' weights in this dtype, for forward passes under autocast to it.
        files: Of a base that is hollow: every process reads its own shards there. None for a base with its weights.
    """
    adapters = {p for role in roles.specs if not roles.owns_copies(role) for p in roles.parameters(role)}
    for parameter in adapters:
        parameter.data = parameter.data.to(device)
    bases = {id(network) for network in roles.bases.values()}
    if files is not None:
        for network in roles.bases.values():
            _onto_meta(network, adapters)
    for network in roles.networks():
        block_policy = MixedPrecisionPolicy()
        if compute is not None and id(network) not in bases:
            block_policy = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
        ignored = adapters & set(network.parameters())
        for block in roles.family.blocks_of(network):
            fully_shard(block, mesh=mesh, mp_policy=block_policy, ignored_params=ignored & set(block.parameters()))
        fully_shard(
            network, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), ignored_params=ignored
        )
        network._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view")  # nothing changes it in place
    roles.forget_parameters()
    if files is not None:
        for component in roles.bases:
            files.fill(component, roles.base_state_dict(component))
    for role in roles.specs:
        if roles.owns_copies(role):
            roles.reset(role)


def _onto_meta(network: nn.Module, adapters: set[nn.Parameter]) -> None:
    """Leave of all weights but those of adapters only their shapes, of which shards are made."""
    for module in network.modules():
        for name, own in list(module.named_parameters(recurse=False)):
            if own not in adapters:
                empty = torch.empty(own.shape, dtype=own.dtype, device="meta")
                setattr(module, name, nn.Parameter(empty, requires_grad=False))


def whole(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors without shards, on the CPU, in this dtype. All processes must ask together."""
    return {name: gathered(value).to("cpu", dtype) for name, value in state.items()}


def load_whole(roles: Roles, role: str, state: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into a role, whose copies may be in shards. All processes must ask together.

    Args:
        roles: The networks.
        role: The name of a role.
        state: Its weights by name.

    Raises:
        ValueError: Names or shapes differ.
    """
    own = roles.state_dict(role)
    check_fits(role, own, state)
    divided = {
        name: distribute_tensor(state[name].to(value.device, value.dtype), value.device_mesh, value.placements)
        for name, value in own.items()
        if isinstance(value, DTensor)
    }
    roles.load_state_dict(role, {**state, **divided})


def gathered(value: Tensor) -> Tensor:
    """A tensor without shards. All processes must ask together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def average_gradients(parameters: list[nn.Parameter], processes: int, bucket: int = 2**26) -> None:
    """Gradients become their means over processes, in buckets of this many numbers; those of shards are already."""
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    while processes > 1 and gradients:
        some, count = [gradients.pop()], 0
        while gradients and (count := count + some[-1].numel()) < bucket:
            some.append(gradients.pop())
        flat = torch.cat([gradient.flatten() for gradient in some])
        dist.all_reduce(flat)
        flat /= processes
        for gradient, mean in zip(some, flat.split([g.numel() for g in some]), strict=True):
            gradient.copy_(mean.view_as(gradient))

"""The memory that weights, gradients and optimizers of a run take on each GPU, counted on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from pdmd_core.method import fake_roles
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import FAKE, TEACHER, Roles
from training.config.schema import DistillConfig
from training.distributed.sharding import group_size
from training.loop.optimizers import MOMENTS
from training.memory.quantization import BYTES, quantized_numbers

FLOAT32 = 4
"""Bytes of a weight that trains or has trained, and of its gradient."""
_ADAPTER = {"lora_A", "lora_B"}


@dataclass(frozen=True)
class Held:
    """What one role takes."""

    role: str
    bytes: float
    """On each GPU."""
    how: str


@dataclass(frozen=True)
class StaticMemory:
    """What a GPU holds beside activations, at the moment when it is most."""

    parts: list[Held]
    base: float
    """Bytes of the frozen teacher on each GPU."""
    all_networks: float
    """Bytes of all its networks, where only one is on the GPU at a time; otherwise those of the base."""
    loaded: float
    """Bytes of the teacher in the host memory of each process: all its networks before they go to the GPU; with shards,
    which are read one by one, those of the largest weight."""
    swapped: float = 0.0
    """Bytes that block swap copies in a pass through a network of the teacher, on average over its networks."""

    @property
    def bytes(self) -> float:
        """All parts."""
        return sum(part.bytes for part in self.parts)


def static_memory(config: DistillConfig, plan: PhasePlan, roles: Roles, gpus: int) -> StaticMemory:
    """What is held between evaluations, role by role, and what shards are gathered into. Activations come on top.

    Gradients are those of one role: a step frees them before another role's are made.
    """
    shards = group_size(config, gpus)
    sizes = _base_sizes(config, roles)
    alone = config.memory.offload_idle_network and len(sizes) > 1
    swapped = _swapped(config, roles)
    places = 2 * max(map(max, swapped)) if swapped else 0
    base = (max(sizes) if alone else sum(sizes) - sum(map(sum, swapped)) + places) / shards
    how = f", {max(map(len, swapped))} blocks of each network pass through places for two" if swapped else ""
    parts = [Held(TEACHER, base, _about_base(config, roles, alone) + _in_shards(shards) + how)]
    fakes = fake_roles(plan, config.objective)
    gradients, idle = {"expert": 0.0, FAKE: 0.0}, 0.0
    for role, spec in roles.specs.items():
        pieces = shards if spec.kind == "full" else 1
        count = _count(roles.parameters(role)) / pieces
        how = f"{in_millions(_count(roles.parameters(role)))}, "
        how += f"LoRA rank {spec.rank}, alpha {spec.alpha:g}" if spec.kind == "lora" else "full copy"
        how += f" on {' and '.join(roles.components(role))}" if len(roles.bases) > 1 else ""
        how += _in_shards(pieces)
        size = count * FLOAT32
        if role in (*fakes, plan.phases[-1].name):  # experts train one after the other, the others are frozen
            optimizer = (config.fake if role in fakes else config.generator).optimizer
            average = FLOAT32 if config.ema_decay and role not in fakes else 0
            how += f", {optimizer}"
            networks = len(roles.components(role)) if config.score_groups == 1 else 1  # a step is on one of them
            gradients[FAKE if role in fakes else "expert"] = size / networks
            parts.append(Held(role, size + count * (MOMENTS[optimizer] + average), how))
        elif config.memory.offload_idle_experts:
            idle = max(idle, size)
            parts.append(Held(role, 0.0, f"{how}, off the GPU but while it computes"))
        else:
            parts.append(Held(role, size, how))
    together = gradients["expert"] + idle if _gradients_meet_rollouts(config, gpus) else max(gradients["expert"], idle)
    how = "of one role at a time" + (", and an idle expert while it computes" if idle else "")
    parts.append(Held("gradients", max(together, gradients[FAKE]), how))
    if shards > 1:
        largest = max(
            _count(block.parameters()) for network in roles.networks() for block in roles.family.blocks_of(network)
        )
        parts.append(Held("gathered", 2 * largest * 4, "two blocks of a network, the one that runs and the next"))
    loaded = float(sum(sizes))
    if shards > 1:
        wide = getattr(torch, config.model.dtype).itemsize
        loaded = max(p.numel() for network in roles.bases.values() for p in network.parameters()) * wide / shards
    streamed = sum(map(sum, swapped)) / max(1, len(swapped))
    return StaticMemory(parts, base, sum(sizes) / shards, loaded, streamed)


def _swapped(config: DistillConfig, roles: Roles) -> list[list[int]]:
    """Bytes of the frozen weights of each block that is swapped, by network of the teacher; empty without swap."""
    if not (count := config.memory.swap_blocks):
        return []
    return [
        [_frozen_bytes(config, network, block) for block in roles.family.blocks_of(network)[-count:]]
        for network in roles.bases.values()
    ]


def _base_sizes(config: DistillConfig, roles: Roles) -> list[int]:
    """Bytes of each network of the teacher; diffusers keeps some of its weights in float32."""
    wide = getattr(torch, config.model.dtype).itemsize
    sizes = []
    for network in roles.bases.values():
        size = _frozen_bytes(config, network, network)
        if (kind := config.model.quantization) != "none":
            size -= int(quantized_numbers(network, roles.family) * (wide - BYTES[kind]))
        sizes.append(size)
    return sizes


def _frozen_bytes(config: DistillConfig, network: nn.Module, part: nn.Module) -> int:
    """Of a part of a network of the teacher, without adapters. Names are looked at inside the part."""
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    wide = getattr(torch, config.model.dtype).itemsize
    return sum(
        parameter.numel() * (FLOAT32 if kept & parts else wide)
        for name, parameter in part.named_parameters()
        if not _ADAPTER & (parts := set(name.split(".")))
    )


def _about_base(config: DistillConfig, roles: Roles, alone: bool) -> str:
    count = sum(
        parameter.numel()
        for network in roles.bases.values()
        for name, parameter in network.named_parameters()
        if not _ADAPTER & set(name.split("."))
    )
    dtype, kind = config.model.dtype, config.model.quantization
    how = f"{in_millions(count)} in {dtype if kind == 'none' else f'{kind} and {dtype}'}"
    return how + (", one network at a time" if alone else "")


def _gradients_meet_rollouts(config: DistillConfig, gpus: int) -> bool:
    """Whether the samples of an update come in parts: gradients of one are there in the rollout of the next."""
    own = config.batch_size // config.groups(gpus)
    return own > (config.memory.micro_batch_size or own) or (config.memory.offload_idle_network and own > 1)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _in_shards(parts: int) -> str:
    return f", 1/{parts} of it" if parts > 1 else ""


def in_millions(count: int) -> str:
    """A number of parameters in words."""
    return f"{count / 1e9:.2f} G parameters" if count >= 1e9 else f"{count / 1e6:.2f} M parameters"


def in_words(count: float) -> str:
    """A number of bytes in words."""
    return f"{count / 2**30:7.2f} GiB" if count >= 2**30 else f"{count / 2**20:7.1f} MiB"

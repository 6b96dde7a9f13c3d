"""The memory that weights, gradients and optimizers of a run take on each GPU, counted on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from pdmd_core.phases import PhasePlan
from pdmd_core.roles import FAKE, TEACHER, Roles
from training.config import DistillConfig
from training.optimizers import MOMENTS
from training.quantization import quantized_numbers
from training.sharding import blocks_of, group_size

TRAINED = 8
"""Bytes for each weight that trains: itself and its gradient in float32; the optimizer's moments come on top."""


@dataclass(frozen=True)
class Held:
    """What one role takes."""

    role: str
    bytes: float
    """On each GPU."""
    how: str


def static_memory(config: DistillConfig, plan: PhasePlan, roles: Roles, gpus: int) -> list[Held]:
    """What is held between evaluations, role by role, and what shards are gathered into. Activations come on top."""
    shards = group_size(config, gpus)
    counts = {name: _count(network.parameters()) - _adapters(roles, name) for name, network in roles.bases.items()}
    dtype, kind, alone = config.model.dtype, config.model.quantization, config.offload_idle_network
    sizes = {name: count * getattr(torch, dtype).itemsize for name, count in counts.items()}
    if kind != "none":
        for name, network in roles.bases.items():
            sizes[name] -= quantized_numbers(network) * (getattr(torch, dtype).itemsize - 1)
    how = f"{in_millions(sum(counts.values()))} in {dtype if kind == 'none' else f'{kind} and {dtype}'}"
    resident = max(sizes.values()) if alone else sum(sizes.values())
    how += ", one network at a time" if alone else ""
    held = [Held(TEACHER, resident / shards, how + _in_shards(shards))]
    for role, spec in roles.specs.items():
        count = _count(roles.parameters(role))
        # Experts train one after the other: the others are frozen then, and hold their weights only.
        trains = role in (FAKE, plan.phases[-1].name)
        average = 4 if config.ema_decay and trains and role != FAKE else 0
        parts = shards if spec.kind == "full" else 1
        how = f"LoRA rank {spec.rank}, alpha {spec.alpha:g}" if spec.kind == "lora" else "full copy"
        where = f" on {' and '.join(roles.components(role))}" if len(roles.bases) > 1 else ""
        optimizer = (config.fake if role == FAKE else config.generator).optimizer
        size = count * ((TRAINED + MOMENTS[optimizer] if trains else 4) + average) / parts
        held.append(Held(role, size, f"{in_millions(count)}, {how}{where}{_in_shards(parts)}"))
    if shards > 1:
        largest = max(_count(block.parameters()) for network in roles.networks() for block in blocks_of(network))
        held.append(Held("gathered", 2 * largest * 4, "two blocks of a network, the one that runs and the next"))
    return held


def _adapters(roles: Roles, component: str) -> int:
    """Numbers in the adapters inside a network of the teacher."""
    lora = [role for role in roles.specs if not roles.owns_copies(role)]
    own = {id(p) for role in lora for p in roles.parameters(role)}
    return _count(p for p in roles.bases[component].parameters() if id(p) in own)


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

"""What a run would do, without doing it: weights are described on the meta device."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from pdmd_core.distillation import evaluations_per_update
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import FAKE, TEACHER, Roles
from training.command_line import UserError
from training.config import ConfigError, DistillConfig
from training.prompts import read_prompts
from training.teacher import TeacherSource, family_of_pipeline, networks_of

OPTIMIZED = 4
"""Float32 numbers for each weight that trains: itself, its gradient, AdamW's two moments."""


def pipeline_on_meta(source: TeacherSource) -> DiffusionPipeline:
    """The pipeline with networks and autoencoder without weights, from its configs alone. Raises TeacherError."""
    index, kind = source.index(), source.pipeline_class()
    parts: dict[str, Any] = {}
    try:
        for name in inspect.signature(kind.__init__).parameters:
            if isinstance(index.get(name), list):
                described = name.startswith(("transformer", "vae")) and index[name][1] is not None
                parts[name] = _on_meta(index[name][1], source, name) if described else None
            elif name in index:
                parts[name] = index[name]
        return kind(**parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise source.cannot_load(error) from None


def _on_meta(architecture: str, source: TeacherSource, name: str) -> nn.Module:
    kind = getattr(diffusers, architecture)
    settings = kind.load_config(source.path, subfolder=name, revision=source.revision)
    with torch.device("meta"):
        return kind.from_config(settings)


def describe(config: DistillConfig, memory_per_gpu: float | None = None) -> str:
    """Plan, roles, static memory of a GPU, evaluations per update, outputs.

    memory_per_gpu: in GiB. Raises UserError when the static memory is more.
    """
    plan, model = config.plan.build(), config.model
    prompts = read_prompts(config.prompts)
    source = TeacherSource(str(model.architecture or model.path), model.revision, model.pipeline)
    pipeline = pipeline_on_meta(source)
    family = family_of_pipeline(pipeline)
    try:
        shape = family.latent_shape(pipeline, model.height, model.width, model.frames)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    routing, networks = family.teacher_routing(pipeline.config), networks_of(pipeline, family)
    base = {name: _count(network) for name, network in networks.items()}
    specs = config.role_specs(routing)
    with torch.device("meta"):
        roles = Roles(networks, family, specs, routing)
    lines = [plan.describe(), "", f"teacher: {model.path} ({type(pipeline).__name__}, {family.architecture})"]
    if routing.boundary is not None:
        first, second = routing.components
        lines.append(f"  {first} at sigma >= {routing.boundary:g}, {second} below")
    size = f"{model.width}x{model.height}" + (f", {model.frames} frames" if model.frames > 1 else "")
    lines += [f"samples: {size}, latents {'x'.join(map(str, shape))}", "", "static memory of a GPU:"]
    held = {TEACHER: sum(base.values()) * getattr(torch, model.dtype).itemsize}
    lines.append(f"  {TEACHER:12} {_bytes(held[TEACHER])}: {_weights(sum(base.values()))} in {model.dtype}")
    for role, spec in roles.specs.items():
        count = sum(p.numel() for p in roles.parameters(role))
        # Experts train one after the other: the others are frozen then, and hold their weights only.
        trains = role in (FAKE, plan.phases[-1].name)
        average = bool(config.ema_decay) and trains and role != FAKE
        held[role] = 4 * count * ((OPTIMIZED if trains else 1) + average)
        how = f"LoRA rank {spec.rank}, alpha {spec.alpha:g}" if spec.kind == "lora" else "full copy"
        where = f" on {' and '.join(roles.components(role))}" if len(networks) > 1 else ""
        lines.append(f"  {role:12} {_bytes(held[role])}: {_weights(count)}, {how}{where}")
    total = sum(held.values())
    lines += [f"  {'all':12} {_bytes(total)}: weights, gradients, optimizer; activations come on top", ""]
    lines += [*_evaluations(config, plan), ""]
    files = ["config.yaml", "metrics.jsonl", "samples/", "checkpoints/", "logs/", "experts/"]
    lines += [
        f"{len(prompts)} prompts from {config.prompts}",
        f"writes {', '.join(str(Path(config.output_dir) / f) for f in files)}",
    ]
    if memory_per_gpu is not None and total > memory_per_gpu * 2**30:
        largest = max(held, key=lambda role: held[role])
        raise UserError(
            f"does not fit: {_bytes(total).strip()} of weights, gradients and optimizer for each GPU, "
            f"{memory_per_gpu:g} GiB given; the largest is {largest} ({_bytes(held[largest]).strip()}); use kind: "
            "lora, a lower rank, or model.dtype: bfloat16"
        )
    return "\n".join(lines)


def _evaluations(config: DistillConfig, plan: PhasePlan) -> list[str]:
    lines = []
    for k, phase in enumerate(plan.phases):
        counts = evaluations_per_update(plan, k, config.fake_updates, config.draws_per_rollout)
        parts = ", ".join(f"{name} {value:g}" for name, value in counts.items())
        lines.append(
            f"phase {phase.name}: {config.updates_of(k)} updates of {config.batch_size} samples, "
            f"{sum(counts.values()):g} network evaluations each ({parts}; the teacher's is of twice the batch)"
        )
    return lines


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _weights(count: int) -> str:
    return f"{count / 1e9:.2f} G parameters" if count >= 1e9 else f"{count / 1e6:.2f} M parameters"


def _bytes(count: float) -> str:
    return f"{count / 2**30:7.2f} GiB" if count >= 2**30 else f"{count / 2**20:7.1f} MiB"

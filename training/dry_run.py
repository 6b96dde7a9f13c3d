"""What a run would do, without doing it: weights are described on the meta device."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from pdmd_core.distillation import evaluations_per_update
from pdmd_core.families import ModelFamily, family_of
from pdmd_core.roles import FAKE, Roles
from training.config import DistillConfig
from training.prompts import read_prompts
from training.teacher import TeacherError


def network_on_meta(config: DistillConfig) -> tuple[nn.Module, ModelFamily]:
    """The teacher's network without weights, from its configuration alone. Raises TeacherError."""
    model = config.model
    try:
        index = DiffusionPipeline.load_config(model.path, revision=model.revision)
        architecture = index["transformer"][1]
        network_class = getattr(diffusers, architecture)
        settings = network_class.load_config(model.path, subfolder="transformer", revision=model.revision)
        family = family_of(architecture)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise TeacherError(f"model.path: cannot read {model.path!r}: {' '.join(str(error).split())}") from None
    with torch.device("meta"):
        return network_class.from_config(settings), family


def describe(config: DistillConfig) -> str:
    """Plan, roles, static memory, evaluations per update, outputs."""
    plan = config.plan.build()
    prompts = read_prompts(config.prompts)
    network, family = network_on_meta(config)
    base_count = sum(p.numel() for p in network.parameters())
    base_bytes = base_count * getattr(torch, config.model.dtype).itemsize
    specs = {phase.name: config.generator.build() for phase in plan.phases} | {FAKE: config.fake.build()}
    with torch.device("meta"):
        roles = Roles(network, family, specs)
    lines = [plan.describe(), "", f"teacher   {config.model.path} ({family.architecture}, {_millions(base_count)})"]
    total = base_bytes
    for role, spec in specs.items():
        count = sum(p.numel() for p in roles.parameters(role))
        # float32 weights; gradient and two moments while the role trains, all experts but one being frozen
        trains = role in (FAKE, plan.phases[-1].name)
        bytes_ = count * 4 * (4 if trains else 1) + (count * 4 if config.ema_decay and trains and role != FAKE else 0)
        total += bytes_
        how = f"LoRA rank {spec.rank}, alpha {spec.alpha:g}" if spec.kind == "lora" else "full copy"
        lines.append(f"{role:9} {how}: {_millions(count)}, {_mebibytes(bytes_)}")
    lines += [
        "",
        f"static memory (weights, gradients, optimizer): {_mebibytes(total)}, base {_mebibytes(base_bytes)}",
        "",
    ]
    for k, phase in enumerate(plan.phases):
        counts = evaluations_per_update(plan, k, config.fake_updates, config.draws_per_rollout)
        parts = ", ".join(f"{name} {value:g}" for name, value in counts.items())
        lines.append(
            f"phase {phase.name}: {config.updates_of(k)} updates of {config.batch_size} samples, "
            f"{sum(counts.values()):g} network evaluations each ({parts}; the teacher's is of twice the batch)"
        )
    files = ["config.yaml", "metrics.jsonl", "samples/", "checkpoints/", "logs/", "experts/"]
    lines += [
        "",
        f"{len(prompts)} prompts from {config.prompts}",
        f"writes {', '.join(str(Path(config.output_dir) / f) for f in files)}",
    ]
    return "\n".join(lines)


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M parameters"


def _mebibytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

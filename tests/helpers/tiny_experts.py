"""Folders of random LoRA experts for any tiny teacher on disk, written in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from pdmd_core.experts import BaseModel, Expert, Manifest, PhasedExperts, lora_to_file, write_experts
from pdmd_core.experts.format.fingerprint import fingerprint_of
from pdmd_core.families import family_of
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import Roles, RoleSpec
from tests.helpers.tiny import randomise

PLAN = PhasePlan.from_steps([1, 1], shift=3.0)


def save_experts(
    folder: Path,
    teacher: Path,
    size: tuple[int, int, int],
    components: Sequence[str] = ("transformer", "transformer"),
    plan: PhasePlan = PLAN,
    seed: int = 0,
    **training: Any,
) -> Path:
    """Experts of rank 2, all different, for samples of this (width, height, frames)."""
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    family = family_of(type(pipeline.transformer).__name__)
    networks = {name: getattr(pipeline, name) for name in family.teacher_routing(pipeline.config).components}
    specs = {
        phase.name: RoleSpec("lora", 2, 2.0, components=(component,))
        for phase, component in zip(plan.phases, components, strict=True)
    }
    torch.manual_seed(seed)
    roles = Roles(networks, family, specs, family.teacher_routing(pipeline.config))
    experts, weights = [], {}
    for k, (name, component) in enumerate(zip(specs, components, strict=True)):
        randomise(roles, name, 10 * seed + k)
        weights[name] = lora_to_file(roles.state_dict(name), 2.0, family)
        experts.append(Expert(name, f"{name}.safetensors", "lora", "", component, 2, 2.0, family.lora_targets))
    training = {"size": list(size), "max_sequence_length": 12, "teacher_guidance_scale": 2.0} | training
    base = BaseModel(str(teacher), family.architecture, family.name)
    write_experts(folder, Manifest(base, plan, tuple(experts), 1.0, training), weights)
    return folder


def note_fingerprints(folder: Path, networks: Mapping[str, nn.Module]) -> Path:
    """Write the folder again, as of a base with these networks by component."""
    experts = PhasedExperts.open(folder)
    prints = {component: fingerprint_of(network) for component, network in networks.items()}
    manifest = replace(experts.manifest, base=replace(experts.manifest.base, fingerprints=prints))
    tensors = {expert.name: experts.tensors(expert.name) for expert in manifest.experts}
    write_experts(folder, manifest, tensors)
    return folder

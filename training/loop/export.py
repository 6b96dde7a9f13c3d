"""From trained roles to an experts folder: weights, manifest, scheduler, model card."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from pdmd_core.experts import BaseModel, Expert, ExpertsError, Manifest, PhasedExperts, lora_to_file, write_experts
from pdmd_core.experts.format.fingerprint import base_warning, network_weights, sampler_of
from pdmd_core.experts.hub.card import write_card
from pdmd_core.families import ModelFamily, TeacherRouting
from pdmd_core.method import changed_choices, fake_roles
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import Roles, RoleSpec
from pdmd_core.scheduler import PhasedDMDScheduler
from training.config.schema import DistillConfig
from training.data.examples import Example
from training.distributed.sharding import whole
from training.loop.progress import Progress


def export_experts(
    folder: Path,
    config: DistillConfig,
    plan: PhasePlan,
    roles: Roles,
    training: Mapping[str, Any],
    fingerprints: Mapping[str, Mapping[str, str]],
    write: bool = True,
    states: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write ``folder`` as described in docs: one safetensors file for each phase, manifest, scheduler, README.

    All processes must ask together where weights are in shards, one of them with ``write``.

    Args:
        folder: The folder to write.
        config: The configuration of the run.
        plan: The phases whose experts are written: the run's, or the first of them (``trained_part``).
        roles: The networks.
        training: The summary of the training, for the manifest.
        fingerprints: Of the teacher's networks by component, taken before they were changed in any way.
        write: Whether this process writes.
        states: Weights of experts by name, in place of those in ``roles``.
    """
    dtype = getattr(torch, config.export.dtype)
    experts, weights = [], {}
    for phase in plan.phases:
        spec = roles.specs[phase.name]
        state = whole(states[phase.name] if states else roles.state_dict(phase.name), dtype)
        if not write:
            continue
        lora = spec.kind == "lora"
        weights[phase.name] = lora_to_file(state, spec.alpha, roles.family) if lora else _contiguous(state)
        experts.append(
            Expert(
                name=phase.name,
                file=f"{phase.name}.safetensors",
                kind=spec.kind,
                sha256="",
                component=roles.components(phase.name)[0],
                rank=spec.rank if lora else None,
                alpha=roles.family.lora_keys.alpha_in_file(spec.rank, spec.alpha) if lora else None,
                targets=tuple(spec.targets or roles.family.lora_targets) if lora else None,
            )
        )
    if not write:
        return
    used = sorted({expert.component for expert in experts})
    base = BaseModel(
        model=config.model.path,
        architecture=roles.family.architecture,
        family=roles.family.name,
        revision=config.model.revision,
        fingerprints={name: dict(fingerprints[name]) for name in used if fingerprints.get(name)} or None,
    )
    manifest = write_experts(folder, Manifest(base, plan, tuple(experts), 1.0, training), weights)
    PhasedDMDScheduler.from_plan(plan).save_pretrained(folder / "scheduler")
    write_card(folder, manifest)


def trained_part(plan: PhasePlan, phase: int) -> PhasePlan:
    """The plan of the experts up to a phase. After its last sigma samples jump to 0, as those of validations do.

    Args:
        plan: The plan of a run.
        phase: Index of its last phase that is trained, or in training.

    Returns:
        A plan that can be sampled; the run's own after its last phase.
    """
    return PhasePlan(plan.phases[: phase + 1])


def training_summary(
    config: DistillConfig,
    plan: PhasePlan,
    progress: Progress,
    start: Mapping[str, Mapping[str, Any]],
    pipeline: DiffusionPipeline,
    history: Sequence[str] = (),
) -> dict[str, Any]:
    """Summarise how experts were trained, for the manifest.

    Args:
        config: The configuration of the run.
        plan: Its phase plan.
        progress: Where the run is; the last of the experts is that of its phase.
        start: By expert, what it is or begins from beside the teacher.
        pipeline: The teacher's.
        history: What was changed on request since the run began.

    Returns:
        What JSON can hold. ``unfinished`` names the phases that are missing and the whole plan.
    """
    missing = [phase.name for phase in plan.phases[progress.phase + 1 :]]
    unfinished = {"unfinished": {"missing": missing, "plan": plan.to_dict()}} if missing else {}
    first = config.first_phase
    keys = {
        "fake_updates": config.fake_updates,
        "draws_per_rollout": config.draws_per_rollout,
        "fake_lr": config.fake.lr,
    }
    of_fake = keys if fake_roles(plan, config.objective) else {}
    begun = {name: {k: v for k, v in note.items() if k not in ("spec", "sampled")} for name, note in start.items()}
    own = {"teacher_guidance_scale": config.objective.guidance_scale, "negative_prompt": config.data.negative_prompt}
    # what experts that teach sample is what the model sampled that taught them
    sampled = own | next((note["sampled"] for note in start.values() if "sampled" in note), {})
    taught = {name: note for name, note in begun.items() if name not in {phase.name for phase in plan.phases}}
    begun = {name: note for name, note in begun.items() if name not in taught}
    return {
        "method": _method(config, plan),
        "updates": [*(config.updates_of(k) if k >= first else 0 for k in range(progress.phase)), progress.update],
        "batch_size": config.batch_size,
        **of_fake,
        **sampled,
        "pipeline": type(pipeline).__name__,
        "generator_lr": config.generator.lr,
        "seed": config.seed,
        "size": [config.model.width, config.model.height, config.model.frames],
        "max_sequence_length": config.model.max_sequence_length,
        **_of_images(next(iter(config.data)), config.model.frames),
        **({"objective": chosen} if (chosen := changed_choices(config.objective)) else {}),
        **unfinished,
        **({"start": begun} if begun else {}),
        **({"teacher_experts": taught} if taught else {}),
        **({"changes": list(history)} if history else {}),
    }


def _method(config: DistillConfig, plan: PhasePlan) -> str:
    if config.objective.expert_loss != "matching":
        return config.objective.expert_loss
    return "Phased DMD" if len(plan) > 1 else "DMD"


def _of_images(example: Example, frames: int) -> dict[str, Any]:
    """What is trained with images, told by one of the examples."""
    if example.image is None:
        return {}
    tag = {"pipeline_tag": "image-to-video" if frames > 1 else "image-to-image"}  # as the Hub calls it
    return tag if example.last_image is None else {**tag, "last_image": True}


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in state.items()}


def roles_from_experts(
    experts: PhasedExperts, networks: Mapping[str, nn.Module], family: ModelFamily, routing: TeacherRouting
) -> Roles:
    """Roles of an opened experts folder on a teacher's networks, weights loaded. Raises ExpertsError."""
    manifest = experts.manifest
    for expert in manifest.experts:
        if expert.component not in networks:
            raise ExpertsError(
                f"{experts.folder}: expert {expert.name!r} belongs to {expert.component}, which this teacher does not "
                f"have: use the base {manifest.base.model!r}"
            )
        found = type(networks[expert.component]).__name__
        if found != manifest.base.architecture:
            raise ExpertsError(
                f"{experts.folder}: experts of a {manifest.base.architecture}, found a {found}: "
                f"use the base {manifest.base.model!r}"
            )
    specs = {
        expert.name: RoleSpec(expert.kind, expert.rank or 1, expert.alpha or 1.0, expert.targets, (expert.component,))
        for expert in manifest.experts
    }
    roles = Roles(networks, family, specs, routing)
    for name in sorted({expert.component for expert in manifest.experts if expert.kind == "lora"}):
        if text := base_warning(manifest.base, name, sampler_of(network_weights(networks[name])), f"the {name} here"):
            print(f"warning: {text}", file=sys.stderr)
    for expert in manifest.experts:
        weights = experts.lora_state(expert.name) if expert.kind == "lora" else experts.tensors(expert.name)
        try:
            roles.load_state_dict(expert.name, weights)
        except (ValueError, RuntimeError) as error:
            raise ExpertsError(
                f"{experts.folder}: {expert.file} does not fit the base {manifest.base.model!r}: "
                f"{' '.join(str(error).split())[:300]}"
            ) from None
    return roles

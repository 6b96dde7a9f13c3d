"""What a run starts from beside the model: experts that teach, of earlier phases, or to train further; a LoRA file.

Experts of phases before ``start.phase`` are taken as they are, frozen. With ``start.warm`` the phases that train begin
from weights that are there, fitted to the kind and rank of this run; what a lower rank loses is stated. Where experts
teach, each of the run's begins as the one of them that owns its first sigma.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from pdmd_core.experts import ExpertsError, PhasedExperts
from pdmd_core.experts.convert.low_rank import extract, recompressed
from pdmd_core.experts.convert.released import open_lora
from pdmd_core.experts.format.weights import weights_of
from pdmd_core.families import TeacherRouting
from pdmd_core.hashing import sha256_of
from pdmd_core.phases import Phase
from pdmd_core.roles import Roles, RoleSpec
from training.config.command_line import UserError
from training.config.schema import ConfigError, DistillConfig
from training.distributed.sharding import load_whole, whole
from training.loop.distilled_teacher import distilled_teacher, load_teacher, notes_of, spec_of, taught_by

LORA_SUFFIXES = (".safetensors", ".sft")


@dataclass(frozen=True)
class Start:
    """Weights from which a run starts.

    Attributes:
        path: The experts folder or the LoRA file; None for a run that starts from the teacher alone.
        experts: The opened folder; None for a LoRA file.
        given: Phases whose experts are taken as they are.
        warm: Phases that train from weights that are there.
        notes: By phase: the hash of the file, and of a given one its specification, of a warm one what was lost. By
            role of an expert that teaches: its hash and specification.
        teacher: The opened folder of the experts that teach; None where the model does.
    """

    path: Path | None = None
    experts: PhasedExperts | None = None
    given: tuple[str, ...] = ()
    warm: tuple[str, ...] = ()
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    teacher: PhasedExperts | None = None


def start_of(config: DistillConfig) -> Start:
    """Open what a run starts from, and check that it fits the run's plan. Nothing large is read.

    Args:
        config: The configuration of the run.

    Raises:
        ExpertsError: There are no such experts, or a file is damaged.
        ConfigError: They are not what the run takes.
    """
    path, plan = config.start.experts, config.plan.build()
    teacher = distilled_teacher(config)
    notes = notes_of(teacher)
    if path is None:
        return Start(notes=notes, teacher=teacher)
    names = [phase.name for phase in plan.phases]
    given, trained = tuple(names[: config.first_phase]), tuple(names[config.first_phase :])
    if path.suffix in LORA_SUFFIXES:
        if given:
            raise ConfigError(
                f"start.experts: a LoRA file is no experts of {', '.join(given)}: give an experts folder, or leave "
                "start.phase out"
            )
        open_lora(path)
        digest = sha256_of(path)
        return Start(path, None, (), trained, notes | {name: {"sha256": digest} for name in trained}, teacher)
    experts = PhasedExperts.open(path)
    there = {expert.name: expert for expert in experts.manifest.experts}
    theirs = {phase.name: phase.sigmas for phase in experts.manifest.plan.phases}
    for phase in plan.phases[: config.first_phase]:
        if phase.name not in there:
            raise ConfigError(
                f"start.experts: {path} has no expert {phase.name!r}, which phase {config.start.phase!r} comes after; "
                f"it has {', '.join(there)}"
            )
        if phase.sigmas != theirs[phase.name]:
            raise ConfigError(
                f"start.experts: {phase.name!r} was trained on sigmas {_numbers(theirs[phase.name])}, the plan here "
                f"has {_numbers(phase.sigmas)}: an expert runs at the sigmas of its training"
            )
    warm = tuple(name for name in trained if name in there) if config.start.warm else ()
    if config.start.warm and not warm:
        raise ConfigError(f"start.warm: {path} has {', '.join(there)}, none of the phases that train: leave it out")
    for name in (*given, *warm):
        experts.verify(name)
        notes[name] = {"sha256": there[name].sha256}
        if name in given:
            notes[name]["spec"] = asdict(spec_of(there[name]))
    return Start(path, experts, given, warm, notes, teacher)


def specs_of_run(
    config: DistillConfig, routing: TeacherRouting, notes: Mapping[str, Mapping[str, Any]]
) -> dict[str, RoleSpec]:
    """Every role but the teacher; experts that are given have the kind and rank of their files.

    Args:
        config: The configuration of the run.
        routing: The teacher's networks.
        notes: Of ``Start``, or of a checkpoint.

    Raises:
        ConfigError: The networks that are asked for cannot be.
    """
    specs = config.role_specs(routing)
    for name, note in notes.items():
        if "spec" not in note:
            continue
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in note["spec"].items()}
        spec = RoleSpec(**cast(dict[str, Any], values))
        if name in specs and spec.components != specs[name].components:
            raise ConfigError(
                f"start.experts: expert {name!r} stands on {(spec.components or ('?',))[0]}, here its phase runs on "
                f"{(specs[name].components or ('?',))[0]}"
            )
        specs[name] = spec
    return specs


def load_start(start: Start, config: DistillConfig, roles: Roles, pipeline: DiffusionPipeline) -> list[str]:
    """Copy weights into the roles that start from them. All processes call this together.

    Args:
        start: What ``start_of`` found.
        config: The configuration of the run.
        roles: The networks, as the teacher.
        pipeline: The teacher's, which reads LoRA files of its family.

    Returns:
        What was done, a line for each expert.

    Raises:
        ExpertsError: A file is damaged, or does not fit the teacher.
        UserError: Weights have no place in this run's experts.
    """
    said = load_teacher(start.teacher, roles)
    for name in start.given:
        assert start.experts is not None
        expert = start.experts.manifest.expert(name)
        given = start.experts.lora_state(name) if expert.kind == "lora" else start.experts.tensors(name)
        _load(roles, name, given, start.path)
        said.append(f"{name} is that of {start.path}, frozen")
    for phase in config.plan.build().phases[config.first_phase :]:
        name = phase.name
        if name in start.warm:
            source, theirs, path = start.experts, name, start.path
        elif start.teacher is not None:
            source, theirs, path = start.teacher, _of_teacher(start.teacher, phase, roles), start.teacher.folder
        else:
            continue
        state, errors = _warm_state(start, source, theirs, config, roles, pipeline, name)
        _load(roles, name, state, path)
        lost = _summary(errors)
        if name in start.warm:
            start.notes[name] |= lost
        mean, worst = (lost.get(f"relative_error_{which}", 0.0) for which in ("mean", "worst"))
        how = f"relative error {mean:.3g} (mean), {worst:.3g} (worst, {lost['worst_module']})" if lost else "exactly"
        said.append(f"{name} begins from {path}{f', {theirs}' if theirs != name else ''}: {how}")
    return said


def _of_teacher(teacher: PhasedExperts, phase: Phase, roles: Roles) -> str:
    """The expert that an expert begins as, on the same network."""
    expert, own = taught_by(teacher, phase), roles.components(phase.name)[0]
    if expert.component != own:
        raise ConfigError(
            f"plan: phase {phase.name!r} runs on {own}, at its first sigma {phase.sigmas[0]:.4g} {expert.name!r} on "
            f"{expert.component} teaches: set generator.components to [{expert.component}], or give it other sigmas"
        )
    return expert.name


def _warm_state(
    start: Start,
    experts: PhasedExperts | None,
    theirs: str,
    config: DistillConfig,
    roles: Roles,
    pipeline: DiffusionPipeline,
    name: str,
) -> tuple[Mapping[str, Tensor], Mapping[str, float]]:
    """Weights for a role in its own kind and rank, and the relative error of each module that lost something.

    They are those of an expert of a folder, or of the start's LoRA file.
    """
    spec, component = roles.specs[name], roles.components(name)[0]
    expert = experts.manifest.expert(theirs) if experts else None
    if experts is not None and expert is not None and expert.kind == "full":
        tensors = experts.tensors(theirs)
        if spec.kind == "full":
            return tensors, {}
        if config.model.quantization != "none":
            raise UserError(
                f"start.warm: {name} is a full expert, and the base here is quantized: make LoRA experts of it first, "
                "phased-dmd convert --to lora"
            )
        base = whole(roles.base_state_dict(component), getattr(torch, config.model.dtype))
        targets = spec.targets or roles.family.lora_targets
        found = extract(weights_of(base), weights_of(tensors), targets, spec.rank, torch.float32, f"SVD of {name}")
        lora: Mapping[str, Tensor] = found.lora
        scale, errors = 1.0, dict(found.errors)
        errors |= {f"{module} (left out)": 1.0 for module in found.left_out}
    else:
        lora = experts.lora_state(theirs) if experts else _lora_of_file(start, pipeline)
        scale, errors = 1.0, dict[str, float]()
        if expert is not None:
            scale = float(expert.alpha or 1) / float(expert.rank or 1)
    own = whole(roles.state_dict(name), torch.float32)
    if spec.kind == "full":
        return _merged(own, lora, scale, name), {}
    state, lost = _fitted(own, lora, scale * spec.rank / spec.alpha, spec.rank, name)
    return state, errors | lost


def _lora_of_file(start: Start, pipeline: DiffusionPipeline) -> Mapping[str, Tensor]:
    """``<module>.lora_A`` and ``.lora_B`` by diffusers' names, scaled already."""
    try:
        found = type(pipeline).lora_state_dict(str(start.path), local_files_only=True)
    except (AttributeError, ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{start.path}: not a LoRA that {type(pipeline).__name__} of diffusers reads: {reason}"
        ) from None
    state: dict[str, Tensor] = {}
    for key, value in found.items():
        module, _, part = key.removesuffix(".weight").rpartition(".")
        if part not in ("lora_A", "lora_B") or not module.startswith("transformer."):
            raise UserError(f"{start.path}: {key} is no weight of a LoRA on the teacher's network")
        state[f"{module.removeprefix('transformer.')}.{part}"] = value.float()
    return state


def _fitted(
    own: Mapping[str, Tensor], lora: Mapping[str, Tensor], factor: float, rank: int, name: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A LoRA in the rank of a role. Further ranks keep the role's fresh down-projections and zero up-projections."""
    state, errors = {key: value.clone() for key, value in own.items()}, {}
    for key, down in lora.items():
        if not key.endswith(".lora_A"):
            continue
        module = key.removesuffix(".lora_A")
        if key not in own:
            raise UserError(f"generator.targets: {name} has no LoRA on {module}, which it begins with: add it")
        down, up = down.float(), lora[f"{module}.lora_B"].float() * factor
        if len(down) > rank:
            down, up, error = recompressed(down, up, rank)
            errors[module] = error
        if down.shape[1:] != own[key].shape[1:] or len(up) != len(own[f"{module}.lora_B"]):
            raise UserError(f"{module}, which {name} begins with, is of another size than the teacher's")
        size = down.norm(dim=1)
        used = (size > 1e-6 * size.max()).nonzero().flatten()  # a rank with two zero halves could never learn
        state[key][used] = down[used]
        state[f"{module}.lora_B"].zero_()
        state[f"{module}.lora_B"][:, used] = up[:, used]
    return state, errors


def _merged(own: Mapping[str, Tensor], lora: Mapping[str, Tensor], scale: float, name: str) -> dict[str, Tensor]:
    """A full copy of the teacher with a LoRA added."""
    state = dict(own)
    for key, down in lora.items():
        module, _, part = key.rpartition(".")
        if part != "lora_A":
            continue
        weight = f"{module}.weight"
        product = scale * (lora[f"{module}.lora_B"].float() @ down.float())
        if weight not in own or own[weight].shape != product.shape:
            raise UserError(f"{module}, which {name} begins with, is not in the teacher, or of another size")
        state[weight] = own[weight] + product
    return state


def _load(roles: Roles, name: str, state: Mapping[str, Tensor], path: Path | None) -> None:
    try:
        load_whole(roles, name, state)
    except (ValueError, RuntimeError) as error:
        raise ExpertsError(f"{path}: {name} does not fit this teacher: {' '.join(str(error).split())[:300]}") from None


def _summary(errors: Mapping[str, float]) -> dict[str, Any]:
    if not errors:
        return {}
    worst = max(errors, key=lambda module: errors[module])
    mean = sum(errors.values()) / len(errors)
    return {"relative_error_mean": mean, "relative_error_worst": errors[worst], "worst_module": worst}


def _numbers(sigmas: tuple[float, ...]) -> str:
    return ", ".join(f"{sigma:.4g}" for sigma in sigmas)

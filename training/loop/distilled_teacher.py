"""A teacher that is distilled itself: the experts of a folder on their base, each at the sigmas of its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from pdmd_core.experts import Expert, ExpertsError, PhasedExperts
from pdmd_core.experts.format.fingerprint import Sampler, base_warning, network_weights, sampler_of
from pdmd_core.families import ModelFamily
from pdmd_core.phases import Phase
from pdmd_core.roles import Roles, RoleSpec, teaching
from training.config.schema import ConfigError, DistillConfig
from training.distributed.sharding import load_whole


def distilled_teacher(config: DistillConfig) -> PhasedExperts | None:
    """Open the experts that teach, and check their files, guidance and placement. Nothing large is read into memory.

    Args:
        config: The configuration of the run.

    Returns:
        The experts; None where the model itself teaches.

    Raises:
        ExpertsError: There are no such experts, or a file is damaged.
        ConfigError: The run asks for other guidance than they sample with, or for shards where they are several.
    """
    folder, asked = config.model.experts, config.objective.guidance_scale
    if folder is None:
        return None
    experts = PhasedExperts.open(folder)
    if (own := experts.manifest.guidance_scale) != asked:
        raise ConfigError(
            f"objective.guidance_scale: the experts of {folder} sample with {own:g}{' (none)' if own == 1 else ''}, "
            f"found {asked:g}: set it to that"
        )
    if (phases := len(experts.manifest.plan)) > 1 and config.parallel.sharding != "none":
        raise ConfigError(
            f"model.experts: processes ask for different ones of the {phases} experts of {folder}, so weights stay "
            "whole: set parallel.sharding to none, or leave it out"
        )
    for expert in experts.manifest.experts:
        experts.verify(expert.name)
    return experts


def notes_of(experts: PhasedExperts | None) -> dict[str, dict[str, Any]]:
    """Note of each expert that teaches, by its role, the hash, the specification, and how its own teacher sampled."""
    if experts is None:
        return {}
    noted = experts.manifest.training
    sampled = {key: noted[key] for key in ("teacher_guidance_scale", "negative_prompt") if key in noted}
    return {
        teaching(e.name): {"sha256": e.sha256, "spec": asdict(spec_of(e)), "sampled": sampled}
        for e in experts.manifest.experts
    }


def spec_of(expert: Expert) -> RoleSpec:
    """How a role holds the weights of an expert's file."""
    return RoleSpec(expert.kind, expert.rank or 1, expert.alpha or 1.0, expert.targets, (expert.component,))


def check_base(
    experts: PhasedExperts | None,
    networks: Mapping[str, nn.Module],
    family: ModelFamily,
    warn: Callable[[str], None] | None = None,
    sampler: Callable[[str], Sampler] | None = None,
) -> None:
    """Check that experts that teach stand on these networks.

    Args:
        experts: The experts.
        networks: The base's networks by component.
        family: Their model family.
        warn: Told of a base with other weights than that of the experts; None where there are no weights.
        sampler: Reads samples of the weights of a component; of those of the networks when None.

    Raises:
        ConfigError: They are of another architecture, or of a network that the base lacks.
    """
    if experts is None:
        return
    base = experts.manifest.base
    lacking = sorted({expert.component for expert in experts.manifest.experts} - set(networks))
    if base.architecture != family.architecture or lacking:
        found = f"a {family.architecture}" if not lacking else f"no {lacking[0]}"
        raise ConfigError(
            f"model.experts: the experts of {experts.folder} stand on a {base.architecture}"
            f"{f' with {lacking[0]}' if lacking else ''}, found {found}: give model.path their base, {base.model}"
        )
    for name in sorted({expert.component for expert in experts.manifest.experts}) if warn else ():
        read = sampler(name) if sampler else sampler_of(network_weights(networks[name]))
        if warn and (text := base_warning(base, name, read, f"the {name} of model.path")):
            warn(text)


def load_teacher(experts: PhasedExperts | None, roles: Roles) -> list[str]:
    """Copy the weights of experts that teach into their roles, which teach from then on.

    Args:
        experts: The experts.
        roles: The networks, with a role for each of them.

    Returns:
        What was done, a line.

    Raises:
        ExpertsError: A file does not fit its role.
    """
    if experts is None:
        return []
    for expert in experts.manifest.experts:
        lora = expert.kind == "lora"
        state = experts.lora_state(expert.name) if lora else experts.tensors(expert.name)
        try:
            load_whole(roles, teaching(expert.name), state)
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ExpertsError(f"{experts.folder}: {expert.file} does not fit the base: {reason}") from None
    roles.teacher_plan = experts.manifest.plan
    names = ", ".join(expert.name for expert in experts.manifest.experts)
    return [f"the experts of {experts.folder} teach, each at the sigmas of its interval: {names}"]


def taught_by(experts: PhasedExperts, phase: Phase) -> Expert:
    """Find the expert that owns the first sigma of a phase: what an expert that learns from them begins as."""
    plan = experts.manifest.plan
    return experts.manifest.expert(plan.phases[plan.phase_index(phase.sigmas[0])].name)

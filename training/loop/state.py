"""What a run needs to go on: its state in checkpoints, and the configuration keys that may change meanwhile."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from pdmd_core.roles import FAKE, Roles
from training.config.schema import ConfigError, DistillConfig, leaves_of, with_defaults
from training.loop.checkpoints import load_tensors
from training.loop.optimizers import make_state
from training.loop.phase import PhaseTraining
from training.loop.progress import Progress
from training.loop.rng import RunRNG

FREE_TO_CHANGE = (
    "output_dir",
    "compile",
    "max_bad_updates",
    "data.prompts",
    "data.cache_dir",
    "parallel.",
    "memory.",
    "checkpoints.",
    "validation.",
    "monitoring.",
    "export.",
)
"""Keys, or starts of keys, that may differ between a run and its resumption: they change no number, or only how sums
are rounded. Where prompts lie may differ, what they are may not: ``check_same_prompts``."""


def tensors_of_run(roles: Roles, training: PhaseTraining, draws: RunRNG) -> dict[str, Tensor]:
    """Every tensor that the next update depends on, by name; not copies, but for the generators' states.

    Experts of later phases are not among them: they are what the seed makes them.
    """
    tensors = {f"draws/{name}": value for name, value in draws.state_dict().items()}
    distiller = training.distiller
    for role in [FAKE, *(phase.name for phase in distiller.plan.phases[: distiller.phase + 1])]:
        tensors |= {f"roles/{role}/{name}": value for name, value in roles.state_dict(role).items()}
    for role, optimizer in training.optimizers.items():
        for name, parameter in roles.named_parameters(role).items():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizers/{role}/{name}/{key}"] = value
    if training.average is not None:
        names = roles.named_parameters(training.expert)
        tensors |= {f"average/{name}": value for name, value in zip(names, training.average.shadow_params, strict=True)}
    return tensors


def values_of_run(
    config: DistillConfig, progress: Progress, roles: Roles, training: PhaseTraining, prompts: str
) -> dict[str, Any]:
    """What else it depends on, as JSON knows it. prompts: what identifies their conditioning."""
    return {
        "config": json.loads(config.model_dump_json()),
        "prompts": prompts,
        "progress": asdict(progress),
        "optimizers": {
            role: [name for name, parameter in roles.named_parameters(role).items() if parameter in optimizer.state]
            for role, optimizer in training.optimizers.items()
        },
        "averaged_updates": training.average.optimization_step if training.average is not None else 0,
    }


def resume_from(checkpoint: Path, values: dict[str, Any], roles: Roles, training: PhaseTraining, draws: RunRNG) -> None:
    """Go on where a checkpoint was taken, with a training of its phase. Raises CheckpointError."""
    for role, names in values["optimizers"].items():
        state = training.optimizers[role].state
        make_state(training.optimizers[role])
        for name, parameter in roles.named_parameters(role).items():
            if name not in names:  # had no gradient yet: the last block of Qwen-Image has weights that never get one
                state.pop(parameter, None)
    tensors = tensors_of_run(roles, training, draws)
    load_tensors(checkpoint, tensors)
    draws.load_state_dict({name: tensors[f"draws/{name}"] for name in draws.state_dict()})
    if training.average is not None:
        training.average.optimization_step = values["averaged_updates"]


def check_same_prompts(values: dict[str, Any], prompts: str, config: DistillConfig) -> None:
    """Raises ConfigError when a run with these values of a checkpoint trained on other prompts."""
    if values["prompts"] != prompts:
        raise ConfigError(
            f"data.prompts: the content of {config.data.prompts} changed since the checkpoint (or what encodes it: the "
            "teacher's encoders, the negative prompt), so the run cannot be resumed; set it back or choose another "
            "output_dir"
        )


def check_same_config(before: dict[str, Any], config: DistillConfig) -> list[str]:
    """What changed and may change, a text each. Raises ConfigError when a run of ``before`` cannot go on with this."""
    now = leaves_of(json.loads(config.model_dump_json()))
    then = leaves_of(with_defaults(before))
    changed = {
        key: f"{key}: {then.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(set(then) | set(now))
        if then.get(key) != now.get(key)
    }
    if refused := [text for key, text in changed.items() if not key.startswith(FREE_TO_CHANGE)]:
        raise ConfigError(
            "the configuration changed since the checkpoint, so the run cannot be resumed; set it back or choose "
            f"another output_dir. Changed: {'; '.join(refused)}"
        )
    return list(changed.values())

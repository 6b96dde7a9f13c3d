"""What a run needs to go on: its state in checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from pdmd_core.roles import FAKE, Roles
from training.loop.build import BuiltRun
from training.loop.checkpoints import load_tensors
from training.loop.optimizers import make_state
from training.loop.phase import PhaseTraining
from training.loop.progress import Progress
from training.loop.rng import RunRNG


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


def values_of_run(run: BuiltRun, progress: Progress, training: PhaseTraining) -> dict[str, Any]:
    """What else it depends on, as JSON knows it, and what tells whether teacher and prompts are the same later."""
    roles = run.roles
    return {
        "config": json.loads(run.config.model_dump_json()),
        "prompts": run.data.prompts.identity,
        "teacher": run.teacher,
        "fingerprints": run.fingerprints,
        "start": run.start,
        "history": list(run.history),
        "progress": asdict(progress),
        "optimizers": {
            role: [name for name, parameter in roles.named_parameters(role).items() if parameter in optimizer.state]
            for role, optimizer in training.optimizers.items()
        },
        "averaged_updates": training.average.optimization_step if training.average is not None else 0,
    }


def resume_from(
    checkpoint: Path, values: Mapping[str, Any], roles: Roles, training: PhaseTraining, draws: RunRNG
) -> None:
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

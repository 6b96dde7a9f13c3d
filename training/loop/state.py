"""What a run needs to go on: its state in checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from pdmd_core.roles import Roles
from training.loop.build import BuiltRun
from training.loop.checkpoints import load_tensors
from training.loop.optimizers import make_state
from training.loop.phase import PhaseTraining
from training.loop.progress import Progress
from training.loop.rng import RunRNG


def state_tensors(roles: Roles, training: PhaseTraining, rng: RunRNG) -> dict[str, Tensor]:
    """Collect every tensor that the next update depends on.

    Experts of later phases are not among them: they are what the seed makes them.

    Args:
        roles: The networks of the run.
        training: The phase in training, with its optimizers and the average of its expert.
        rng: The random generators of the run.

    Returns:
        Name to tensor, the tensors themselves and not copies, but for the states of the generators.
    """
    tensors = {f"rng/{name}": value for name, value in rng.state_dict().items()}
    distiller = training.distiller
    for role in [*distiller.fakes, *(phase.name for phase in distiller.plan.phases[: distiller.phase + 1])]:
        tensors |= {f"roles/{role}/{name}": value for name, value in roles.state_dict(role).items()}
    for role, optimizer in training.optimizers.items():
        for name, parameter in roles.named_parameters(role).items():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizers/{role}/{name}/{key}"] = value
    if training.average is not None:
        names = roles.named_parameters(training.expert)
        tensors |= {f"average/{name}": value for name, value in zip(names, training.average.shadow_params, strict=True)}
    return tensors


def state_values(run: BuiltRun, progress: Progress, training: PhaseTraining) -> dict[str, Any]:
    """Collect what else the next update depends on, and what tells whether teacher and prompts are the same later.

    Args:
        run: The run that was built.
        progress: Where it is.
        training: The phase in training.

    Returns:
        The values by name, as JSON knows them.
    """
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


def restore_state(
    checkpoint: Path, values: Mapping[str, Any], roles: Roles, training: PhaseTraining, rng: RunRNG
) -> None:
    """Go on where a checkpoint was taken.

    Args:
        checkpoint: The checkpoint.
        values: Its values, of ``state_values``.
        roles: The networks of the run, whose weights are replaced.
        training: A training of the checkpoint's phase, whose optimizers and average are replaced.
        rng: The random generators of the run, whose states are replaced.

    Raises:
        CheckpointError: If the checkpoint cannot be read, or is of other networks.
    """
    for role, names in values["optimizers"].items():
        state = training.optimizers[role].state
        make_state(training.optimizers[role])
        for name, parameter in roles.named_parameters(role).items():
            if name not in names:  # had no gradient yet: the last block of Qwen-Image has weights that never get one
                state.pop(parameter, None)
    tensors = state_tensors(roles, training, rng)
    load_tensors(checkpoint, tensors)
    rng.load_state_dict({name: tensors[f"rng/{name}"] for name in rng.state_dict()})
    if training.average is not None:
        training.average.optimization_step = values["averaged_updates"]

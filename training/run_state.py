"""What a run needs to go on: its state in checkpoints, and the configuration keys that may change meanwhile."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from pdmd_core.roles import Roles
from training.config import ConfigError, DistillConfig, with_defaults
from training.draws import Draws
from training.phase_training import PhaseTraining
from training.progress import Progress

FREE_TO_CHANGE = {
    "output_dir",
    "tracker",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "sample_every",
    "sample_prompts",
    "sample_seeds",
    "max_bad_updates",
    "watch",
    "cache_dir",
    "expert_dtype",
}
"""Configuration keys that may differ between a run and its resumption: they do not change the numbers."""


def state_of_run(
    config: DistillConfig, progress: Progress, roles: Roles, training: PhaseTraining, draws: Draws
) -> dict[str, Any]:
    """Everything that the next update depends on: tensors and plain values."""
    average = training.average
    return {
        "config": json.loads(config.model_dump_json()),
        "progress": asdict(progress),
        "roles": {role: roles.state_dict(role) for role in roles.specs},
        "optimizers": {role: optimizer.state_dict() for role, optimizer in training.optimizers.items()},
        "average": average.state_dict() if average is not None else None,
        "draws": draws.state_dict(),
    }


def load_state(state: dict[str, Any], roles: Roles, training: PhaseTraining, draws: Draws) -> None:
    """Inverse of ``state_of_run``, for a training of the phase that the state's progress names."""
    for role, weights in state["roles"].items():
        roles.load_state_dict(role, weights)
    for role, optimizer in training.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][role])
    if training.average is not None:
        training.average.load_state_dict(state["average"])
        training.average.to(training.device)
    draws.load_state_dict(state["draws"])


def check_same_config(before: dict[str, Any], config: DistillConfig) -> None:
    """Raises ConfigError when a run of ``before`` cannot go on with ``config``."""
    now = json.loads(config.model_dump_json())
    before = with_defaults(before)
    changed = [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(set(before) | set(now))
        if before.get(key) != now.get(key) and key not in FREE_TO_CHANGE
    ]
    if changed:
        raise ConfigError(
            "the configuration changed since the checkpoint, so the run cannot be resumed; set it back or choose "
            f"another output_dir. Changed: {'; '.join(changed)}"
        )

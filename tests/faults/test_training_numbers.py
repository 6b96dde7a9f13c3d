"""Numbers that are not finite never reach a weight, an average or an optimizer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from pdmd_core.roles import FAKE, TEACHER
from training.config.schema import parse_config
from training.loop.build import build_run
from training.loop.state import state_tensors
from training.loop.trainer import Trainer


def state(trainer: Trainer, role: str) -> dict[str, Tensor]:
    """Weights, average and optimizer of a role."""
    tensors = state_tensors(trainer.roles, trainer.training, trainer.built.rng)
    return {name: value.clone() for name, value in tensors.items() if f"/{role}/" in name or name.startswith("average")}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name, value in after.items() if not torch.equal(before[name], value)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("role", [TEACHER, FAKE])
def test_a_network_that_answers_with_no_number_for_one_sample(
    role: str, value: float, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    trainer = Trainer(build_run(parse_config({**tiny_settings, "output_dir": str(tmp_path / "run")}, "test")))
    trainer.start_phase()
    trainer.update()
    original, expert = trainer.roles.velocity, trainer.training.expert
    before, fake = state(trainer, expert), state(trainer, FAKE)

    def velocity(of: str, x: Tensor, *arguments: Any) -> Tensor:
        found = original(of, x, *arguments)
        return torch.where(torch.arange(len(x)).view(-1, 1, 1, 1, 1) == 1, value, found) if of == role else found

    with mock.patch.object(trainer.roles, "velocity", velocity):
        values = trainer.update()
    assert math.isnan(values.generator.grad_norm)
    assert not moved(before, state(trainer, expert)), "neither the expert nor its average nor its optimizer"
    changed = moved(fake, state(trainer, FAKE))
    assert bool([name for name in changed if "optimizers" in name]) == (role == TEACHER), "the fake's step was good"
    assert (trainer.progress.bad, trainer.progress.bad_in_a_row) == (1, 1)
    trainer.update()
    assert (trainer.progress.bad, trainer.progress.bad_in_a_row) == (1, 0)
    assert moved(before, state(trainer, expert))
    assert all(bool(tensor.isfinite().all()) for tensor in {**state(trainer, expert), **state(trainer, FAKE)}.values())

"""Tiny linear networks for all roles of a plan, which note every evaluation, and distillers of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pdmd_core.batch import Batch, Renoising
from pdmd_core.distillation import PhasedDistiller
from pdmd_core.families.guidance import classifier_free_guidance
from pdmd_core.method import Objective
from pdmd_core.phases import PhasePlan

PLAN = PhasePlan.from_steps([2, 3, 1], shift=5.0, names=["first", "second", "third"])
ROLES = ["teacher", "first", "second", "third", "fake", "fake_2", "fake_3"]
VARIANTS: list[dict[str, Any]] = [
    {"fake_rollouts": "per_step"},
    {"fake_rollouts": "whole", "expert_rollouts": "through"},
    {"fake_rollouts": "whole", "expert_rollouts": "own_increment", "score_draws": 2},
]
"""Choices with which what is matched in phases of several steps is what is sampled."""
REGRESSION: dict[str, Any] = {"expert_loss": "regression", "path_steps": 3}
DENOISING: dict[str, Any] = {"expert_loss": "denoising", "path_steps": 2, "score_shift": 5.0}
every_phase = pytest.mark.parametrize("phase", range(len(PLAN)))
BATCH, FEATURES = 4, 3


@dataclass
class Call:
    role: str
    x: Tensor
    sigma: float | Tensor
    conditioning: dict[str, Tensor]
    recorded: bool
    """Whether autograd records the evaluation."""


class TinyNetworks:
    """One small linear network for each role, all of them trainable: only routing decides what gets gradient."""

    guide = staticmethod(classifier_free_guidance)

    def __init__(self) -> None:
        torch.manual_seed(7)
        self.networks = {role: nn.Linear(2 * FEATURES + 1, FEATURES).double() for role in ROLES}
        self.calls: list[Call] = []

    def velocity(self, role, x, sigma, conditioning):
        column = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x)).reshape(-1, 1)
        velocity = self.networks[role](torch.cat([x, column, conditioning["prompt"]], dim=1))
        self.calls.append(Call(role, x, sigma, conditioning, velocity.requires_grad))
        return velocity

    def roles_with_gradient(self) -> set[str]:
        return {
            role
            for role, network in self.networks.items()
            if any(p.grad is not None and bool(p.grad.any()) for p in network.parameters())
        }


def prompt(value: float) -> dict[str, Tensor]:
    return {"prompt": torch.full((BATCH, FEATURES), value, dtype=torch.float64)}


POSITIVE, NEGATIVE = prompt(1.0), prompt(-0.5)


def normal(seed: int) -> Tensor:
    return torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


START = Batch(normal(1), POSITIVE, NEGATIVE)


def distiller(phase: int, **choices) -> tuple[PhasedDistiller, TinyNetworks]:
    networks = TinyNetworks()
    return PhasedDistiller(PLAN, phase, networks, Objective(**choices)), networks


def generator_update(method: PhasedDistiller, step: int = 0):
    rollout = method.expert_rollout(START, step)
    t = method.draw_score_sigma(BATCH, torch.Generator().manual_seed(2))
    draws = [Renoising(t, normal(3 + draw)) for draw in range(method.objective.score_draws)]
    return rollout, t, method.generator_loss(rollout, START, *draws)

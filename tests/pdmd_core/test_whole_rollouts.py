"""What is sampled, whole rollouts, against the data: Gaussian data, exact fakes, experts that are linear in x.

With exact fakes nothing is left but the choices of the method: which samples the fake knows, and where the expert's
gradient goes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pdmd_core.batch import Batch, Renoising
from pdmd_core.distillation import PhasedDistiller
from pdmd_core.flow import like, transition
from pdmd_core.method import Objective
from pdmd_core.phases import PhasePlan
from tests.helpers.gaussian import GaussianVelocity, LinearVelocity, error, marginal_of_data
from tests.helpers.tiny_networks import REGRESSION, VARIANTS

PLAN = PhasePlan.from_sigmas([[1.0, 0.85], [0.6, 0.35]])
BATCH = 256


class ExactFake:
    """The true velocity at t of Gaussian samples at s, of which mean and variance are given."""

    def __init__(self, samples: Tensor, s: float) -> None:
        self.mean, self.variance, self.s = samples.mean(0), samples.var(0), s

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        t = like(t, x)
        a, b = transition(self.s, t)
        return (t * (x - a * self.mean) / (a.square() * self.variance + b.square()) - x) / (1 - t)


class Networks:
    def __init__(self) -> None:
        teacher = GaussianVelocity()
        self.networks: dict[str, Any] = {"teacher": teacher}
        self.networks |= {phase.name: LinearVelocity(teacher, phase.sigmas) for phase in PLAN.phases}

    def velocity(self, role, x, sigma, conditioning):
        return self.networks[role](x, sigma)

    def guide(self, positive, negative, scale):
        raise AssertionError("there is no guidance here")


def train(networks: Networks, phase: int, choices: dict[str, Any], updates: int = 300) -> PhasedDistiller:
    method = PhasedDistiller(PLAN, phase, networks, Objective(guidance_scale=1.0, **choices))
    generator = torch.Generator().manual_seed(phase)
    expert = torch.optim.Adam(networks.networks[method.expert].parameters(), lr=0.02, betas=(0.0, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(expert, 1.0, 0.02, total_iters=updates)

    def normal() -> Tensor:
        noise = torch.randn(BATCH, 2, generator=generator, dtype=torch.float64)
        return (noise - noise.mean(0)) / noise.std(0)

    steps = range(len(PLAN.phases[phase].sigmas))

    def match(batch: Batch) -> None:
        known: dict[str, list[Tensor]] = {}
        for step in steps:
            known.setdefault(method.fake_of(step), []).append(method.fake_rollout(batch, step))
        networks.networks |= {role: ExactFake(torch.cat(own), method.sigma_end) for role, own in known.items()}
        for step in steps:
            draws = method.objective.score_draws
            renoisings = [Renoising(method.draw_score_sigma(BATCH, generator), normal()) for _ in range(draws)]
            method.generator_loss(method.expert_rollout(batch, step), batch, *renoisings).loss.backward()

    def regress(batch: Batch) -> None:
        for step in steps:
            method.path_loss(batch, step).backward()

    for _ in range(updates):
        expert.zero_grad()
        (regress if method.regresses else match)(Batch(normal(), {}))
        expert.step()
        schedule.step()
    return method


def errors(choices: dict[str, Any]) -> list[float]:
    """Of whole rollouts at the end of each phase, once all are trained."""
    networks = Networks()
    methods = [train(networks, phase, choices) for phase in range(len(PLAN))]
    noise = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    last = len(PLAN.phases[0].sigmas) - 1
    found = [method.fake_rollout(Batch(noise, {}), last) for method in methods]
    return [
        error((x_s.mean(0), x_s.std(0)), *marginal_of_data(method.sigma_end))
        for x_s, method in zip(found, methods, strict=True)
    ]


OF_A_PATH = {**REGRESSION, "path_steps": 40}


@pytest.mark.parametrize("choices", [*VARIANTS, OF_A_PATH], ids=str)
def test_whole_rollouts_match_the_data_at_the_end_of_every_phase(choices):
    assert max(errors(choices)) < 0.03


def test_the_blend_of_truncations_matches_the_data_in_place_of_whole_rollouts():
    assert max(errors({})) > 0.1


def test_truncated_steps_do_not_descend_to_whole_rollouts_that_match():
    """A fake of whole rollouts is right where they match; steps that train by their own jump need not get there."""
    assert max(errors({"fake_rollouts": "whole"})) > 0.1

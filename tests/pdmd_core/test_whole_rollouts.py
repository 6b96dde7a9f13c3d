"""What is sampled, whole rollouts, against what should be: Gaussian data, exact fakes, experts that are linear in x.

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
from pdmd_core.families.guidance import classifier_free_guidance
from pdmd_core.flow import like, transition
from pdmd_core.method import Objective
from pdmd_core.phases import PhasePlan
from tests.helpers.gaussian import STD, GaussianVelocity, LinearVelocity, error, marginal_of_data
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
    """A teacher, and experts that begin as it. With ``guided`` samples ask for data that are less wide."""

    guide = staticmethod(classifier_free_guidance)

    def __init__(self, teacher: GaussianVelocity, guided: bool = False) -> None:
        self.networks: dict[str, Any] = {"teacher": teacher}
        self.networks |= {phase.name: LinearVelocity(teacher, phase.sigmas) for phase in PLAN.phases}
        self.asked = GaussianVelocity(std=0.75 * STD)
        self.sides = ({"asked": torch.ones(BATCH, 1)}, {"asked": torch.zeros(BATCH, 1)}) if guided else ({}, {})

    def velocity(self, role, x, sigma, conditioning):
        found = self.networks[role](x, sigma)
        if role == "teacher" and conditioning:
            return torch.where(conditioning["asked"] > 0, self.asked(x, sigma), found)
        return found


def train(
    networks: Networks, phase: int, choices: dict[str, Any], updates: int = 300, plan: PhasePlan = PLAN
) -> PhasedDistiller:
    method = PhasedDistiller(plan, phase, networks, Objective(**{"guidance_scale": 1.0, **choices}))
    generator = torch.Generator().manual_seed(phase)
    expert = torch.optim.Adam(networks.networks[method.expert].parameters(), lr=0.02, betas=(0.0, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(expert, 1.0, 0.02, total_iters=updates)

    def normal() -> Tensor:
        noise = torch.randn(BATCH, 2, generator=generator, dtype=torch.float64)
        return (noise - noise.mean(0)) / noise.std(0)

    steps = range(len(plan.phases[phase].sigmas))

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

    def denoise(batch: Batch) -> None:
        method.denoising_loss(batch, Renoising(method.draw_score_sigma(BATCH, generator), normal())).backward()

    learn = {"matching": match, "regression": regress, "denoising": denoise}[method.objective.expert_loss]
    samples = method.teacher_samples(Batch(normal(), *networks.sides)) if method.denoises else None
    for _ in range(updates):
        expert.zero_grad()
        learn(Batch(normal(), *networks.sides) if samples is None else Batch(samples, {}, begun=True))
        expert.step()
        schedule.step()
    return method


def errors(choices: dict[str, Any]) -> list[float]:
    """Of whole rollouts at the end of each phase, once all are trained."""
    networks = Networks(GaussianVelocity())
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


MANY = PhasePlan.from_steps([40], shift=5.0, names=["sampled"])
GUIDED: dict[str, Any] = {"guidance_scale": 3.0, "path_steps": 1}
WHOLE: dict[str, Any] = {"fake_rollouts": "whole", "expert_rollouts": "through"}


def test_what_the_guided_teacher_samples_is_matched_by_denoising_first_and_missed_by_guided_velocities():
    """Guided velocities of data with two deviations are those of no Gaussian, and of no other distribution."""
    guided = Networks(GaussianVelocity(), guided=True)
    guided.networks["sampled"] = GaussianVelocity()
    denoiser = train(guided, 0, {**GUIDED, "expert_loss": "denoising"}, 600, MANY)
    noise = torch.randn(BATCH, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    noise = (noise - noise.mean(0)) / noise.std(0)
    sampled = denoiser.teacher_samples(Batch(noise, *guided.sides))
    goal = sampled.mean(0), sampled.std(0)
    learned = guided.networks["sampled"]
    assert error((learned.mean, (learned.log_variance / 2).exp()), *goal) < 0.03
    taught, last = Networks(learned), len(PLAN.phases[1].sigmas) - 1
    found = []
    for networks, scale in ((guided, 3.0), (taught, 1.0)):
        methods = [train(networks, phase, {**WHOLE, "guidance_scale": scale}) for phase in range(2)]
        x = methods[1].fake_rollout(Batch(noise, *networks.sides), last)
        found.append(error((x.mean(0), x.std(0)), *goal))
    assert found[1] < 0.03 < 0.3 < found[0]

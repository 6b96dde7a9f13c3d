"""A whole distillation of Gaussian data with networks that are linear in x."""

import pytest
import torch
from torch import Tensor

from pdmd_core.batch import Batch, Renoising
from pdmd_core.distillation import PhasedDistiller
from pdmd_core.method import Objective
from pdmd_core.phases import PhasePlan
from tests.helpers.gaussian import MEAN, STD, GaussianVelocity, LinearVelocity, error, marginal_of_data

BOUNDARY = 0.6
TWO_PHASES = PhasePlan.from_sigmas([[1.0], [BOUNDARY]])


class GaussianNetworks:
    def __init__(self, plan: PhasePlan) -> None:
        teacher = GaussianVelocity()
        self.networks = {"teacher": teacher, "fake": GaussianVelocity()}
        self.networks |= {phase.name: LinearVelocity(teacher, phase.sigmas) for phase in plan.phases}

    def velocity(self, role, x, sigma, conditioning):
        return self.networks[role](x, sigma)


def train(networks: GaussianNetworks, phase: int, updates: int = 300, **choices) -> PhasedDistiller:
    method = PhasedDistiller(TWO_PHASES, phase, networks, Objective(guidance_scale=1.0, **choices))
    networks.networks["fake"] = GaussianVelocity()
    generator = torch.Generator().manual_seed(phase)

    def draw(batch: int = 128) -> Tensor:
        return torch.randn(batch, 2, generator=generator, dtype=torch.float64)

    def optimizer(role: str, rate: float):
        adam = torch.optim.Adam(networks.networks[role].parameters(), lr=rate, betas=(0.0, 0.99))
        return adam, torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.02, total_iters=updates)

    expert, expert_schedule = optimizer(method.expert, 0.03)
    fake, fake_schedule = optimizer("fake", 0.05)
    for _ in range(updates):
        for _ in range(3):
            x_s = method.fake_rollout(Batch(draw(), {}), method.draw_step(generator))
            fake.zero_grad()
            method.fake_loss(x_s, {}, Renoising(method.draw_score_sigma(128, generator), draw())).backward()
            fake.step()
        batch = Batch(draw(), {})
        rollout = method.expert_rollout(batch, method.draw_step(generator))
        expert.zero_grad()
        renoising = Renoising(method.draw_score_sigma(128, generator), draw())
        method.generator_loss(rollout, batch, renoising).loss.backward()
        expert.step()
        expert_schedule.step()
        fake_schedule.step()
    return method


def moments(method: PhasedDistiller) -> tuple[Tensor, Tensor]:
    noise = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    x_s = method.fake_rollout(Batch(noise, {}), 0)
    return x_s.mean(0), x_s.std(0)


@pytest.mark.parametrize("weighting", ["dmd2", "paper"])
def test_a_distillation_of_two_phases_ends_at_the_data(weighting):
    networks = GaussianNetworks(TWO_PHASES)
    untrained = moments(PhasedDistiller(TWO_PHASES, 1, networks, Objective()))
    first = train(networks, 0, generator_weighting=weighting)
    assert error(moments(first), *marginal_of_data(BOUNDARY)) < 0.15
    last = train(networks, 1, generator_weighting=weighting)
    assert error(untrained, MEAN, STD) > 0.3
    assert error(moments(last), MEAN, STD) < 0.06


def test_the_biased_target_misses_what_the_unbiased_target_reaches():
    networks = {target: GaussianNetworks(TWO_PHASES) for target in ("unbiased", "biased")}
    at_boundary = {
        target: error(moments(train(networks[target], 0, fake_target=target)), *marginal_of_data(BOUNDARY))
        for target in networks
    }
    last = train(networks["unbiased"], 1)
    reached = error(moments(last), MEAN, STD)
    last.networks.networks["high_noise"] = networks["biased"].networks["high_noise"]
    missed = error(moments(last), MEAN, STD)
    assert at_boundary["unbiased"] < 0.15
    assert at_boundary["biased"] > 0.6
    assert reached < 0.06
    assert missed > 0.6

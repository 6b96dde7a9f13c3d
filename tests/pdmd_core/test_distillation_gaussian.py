"""A whole distillation of Gaussian data with networks that are linear in x."""

import pytest
import torch
from torch import Tensor, nn

from pdmd_core.batch import Batch, Renoising
from pdmd_core.distillation import Objective, PhasedDistiller
from pdmd_core.phases import PhasePlan

MEAN = torch.tensor([2.0, -1.0], dtype=torch.float64)
STD = torch.tensor([0.5, 1.5], dtype=torch.float64)
BOUNDARY = 0.6
TWO_PHASES = PhasePlan.from_sigmas([[1.0], [BOUNDARY]])


class GaussianVelocity(nn.Module):
    """The velocity of Gaussian data at every noise level; mean and variance are weights. Teacher and fake."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_variance = nn.Parameter(MEAN.clone()), nn.Parameter(2 * STD.log())

    def forward(self, x, sigma):
        t = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1)
        variance = self.log_variance.exp()
        marginal = (1 - t) ** 2 * variance + t**2
        return (t - (1 - t) * variance) / marginal * (x - (1 - t) * self.mean) - self.mean


class LinearVelocity(nn.Module):
    """slope * x + offset: all that an expert of one step needs. Starts as the teacher at its sigma."""

    def __init__(self, teacher: GaussianVelocity, sigma: float) -> None:
        super().__init__()
        with torch.no_grad():
            offset = teacher(torch.zeros(1, 2, dtype=torch.float64), sigma)[0]
            slope = teacher(torch.ones(1, 2, dtype=torch.float64), sigma)[0] - offset
        self.slope, self.offset = nn.Parameter(slope), nn.Parameter(offset)

    def forward(self, x, sigma):
        return self.slope * x + self.offset


class GaussianNetworks:
    def __init__(self, plan: PhasePlan) -> None:
        teacher = GaussianVelocity()
        self.networks = {"teacher": teacher, "fake": GaussianVelocity()}
        self.networks |= {phase.name: LinearVelocity(teacher, phase.sigmas[0]) for phase in plan.phases}

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
            rollout = method.rollout(Batch(draw(), {}), method.draw_step(generator), gradient=False)
            fake.zero_grad()
            method.fake_loss(rollout.x_s, {}, Renoising(method.draw_score_sigma(128, generator), draw())).backward()
            fake.step()
        batch = Batch(draw(), {})
        rollout = method.rollout(batch, method.draw_step(generator), gradient=True)
        expert.zero_grad()
        renoising = Renoising(method.draw_score_sigma(128, generator), draw())
        method.generator_loss(rollout, batch, renoising).loss.backward()
        expert.step()
        expert_schedule.step()
        fake_schedule.step()
    return method


def moments(method: PhasedDistiller) -> tuple[Tensor, Tensor]:
    noise = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    x_s = method.rollout(Batch(noise, {}), 0, gradient=False).x_s
    return x_s.mean(0), x_s.std(0)


def error(found: tuple[Tensor, Tensor], mean: Tensor, std: Tensor) -> float:
    """Largest deviation of a mean or a standard deviation, relative to the standard deviation."""
    return max(((found[0] - mean) / std).abs().max().item(), (found[1] / std - 1).abs().max().item())


def marginal_of_data(sigma: float) -> tuple[Tensor, Tensor]:
    return (1 - sigma) * MEAN, ((1 - sigma) ** 2 * STD.square() + sigma**2).sqrt()


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

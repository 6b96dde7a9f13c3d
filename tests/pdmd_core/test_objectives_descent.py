"""The generator's direction against the divergence between Gaussians that it descends."""

import math

import numpy as np
import pytest
import torch

from pdmd_core.objectives import (
    distribution_matching_loss,
    generator_direction,
)
from tests.helpers.gaussians import F64, LEVELS, at, coefficients

DATA_MEAN, DATA_STD = 1.5, 0.7
GENERATOR_MEAN, GENERATOR_STD = -0.4, 0.9


def teacher_at(s: float) -> tuple[float, float]:
    """Mean and standard deviation of the data's marginal at s."""
    return (1 - s) * DATA_MEAN, math.sqrt((1 - s) ** 2 * DATA_STD**2 + s**2)


def divergence(theta: float, log_scale: float, s: float, t: float) -> float:
    """KL(generator at t || teacher at t) when x_s ~ N(GENERATOR_MEAN + theta, (GENERATOR_STD exp(log_scale))^2)."""
    a, b = coefficients(s, t)
    mean, variance = a * (GENERATOR_MEAN + theta), a**2 * (GENERATOR_STD * math.exp(log_scale)) ** 2 + b**2
    teacher_mean, teacher_std = teacher_at(t)
    ratio = variance / teacher_std**2
    return 0.5 * (ratio - 1 - math.log(ratio) + (mean - teacher_mean) ** 2 / teacher_std**2)


def velocity_of(x, mean, variance, t):
    """Velocity at t of samples with this Gaussian marginal at t, by way of its score."""
    return (t * (x - mean) / variance - x) / (1 - t)


def surrogate(theta, log_scale, s, t, weighting, normal):
    """The generator's loss at its exact fake and teacher, averaged over normal draws for x_s and for the noise.

    normal: (draws for x_s, draws for the noise, weight of each sample), draws of shape (batch, elements).
    """
    z, noise, weights = normal
    x_s = GENERATOR_MEAN + theta + GENERATOR_STD * torch.exp(log_scale) * z
    a, b = coefficients(s, t)
    x_t = (a * x_s + b * noise).detach()
    mean, std = GENERATOR_MEAN + theta.item(), GENERATOR_STD * log_scale.exp().item()
    fake = velocity_of(x_t, a * mean, a**2 * std**2 + b**2, t)
    teacher_mean, teacher_std = teacher_at(t)
    teacher = velocity_of(x_t, teacher_mean, teacher_std**2, t)
    direction = generator_direction(at(x_t, s, t), teacher, fake, weighting, x0_generator=x_s.detach() / (1 - s))
    return (weights * distribution_matching_loss(x_s, direction)).sum()


def quadrature() -> tuple:
    """Gauss-Hermite points for two independent normals: exact means of polynomials up to degree 13."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(7)
    z, noise = (torch.tensor(grid.reshape(-1, 1)) for grid in np.meshgrid(nodes, nodes))
    product = np.outer(weights, weights).reshape(-1)
    return z, noise, torch.tensor(product / product.sum())


@pytest.mark.parametrize(("s", "t"), LEVELS)
@pytest.mark.parametrize("theta", [-1.0, 0.0, 1.9, 4.0])
def test_generator_gradient_with_paper_weight_is_the_derivative_of_the_divergence(s, t, theta):
    step = 1e-5
    by_mean = (divergence(theta + step, 0.2, s, t) - divergence(theta - step, 0.2, s, t)) / (2 * step)
    by_scale = (divergence(theta, 0.2 + step, s, t) - divergence(theta, 0.2 - step, s, t)) / (2 * step)
    parameters = [torch.tensor(value, dtype=F64, requires_grad=True) for value in (theta, 0.2)]
    surrogate(*parameters, s, t, "paper", quadrature()).backward()
    assert parameters[0].grad.item() == pytest.approx(by_mean, rel=1e-5, abs=1e-8)
    assert parameters[1].grad.item() == pytest.approx(by_scale, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(("s", "t"), LEVELS)
@pytest.mark.parametrize("offset", [-2.0, 2.0])
def test_dmd2_gradient_has_the_sign_of_the_derivative_of_the_divergence(s, t, offset):
    theta = teacher_at(s)[0] - GENERATOR_MEAN + offset
    slope = divergence(theta + 1e-5, 0.0, s, t) - divergence(theta - 1e-5, 0.0, s, t)
    parameter = torch.tensor(theta, dtype=F64, requires_grad=True)
    surrogate(parameter, torch.zeros((), dtype=F64), s, t, "dmd2", quadrature()).backward()
    assert slope != 0
    assert parameter.grad.item() * slope > 0


@pytest.mark.parametrize("weighting", ["paper", "dmd2"])
@pytest.mark.parametrize("s", [0.0, 0.5, 0.8333])
def test_descending_the_generator_loss_reaches_the_teacher(weighting, s):
    theta = torch.zeros((), dtype=F64, requires_grad=True)
    log_scale = torch.zeros((), dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([theta, log_scale], lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=300)
    for update in range(300):
        t = s + (1 - s) * (0.1 + 0.2 * (update % 5))
        draws = (*torch.randn(2, 64, 16, dtype=F64), torch.full((64,), 1 / 64, dtype=F64))
        optimizer.zero_grad()
        surrogate(theta, log_scale, s, t, weighting, draws).backward()
        optimizer.step()
        schedule.step()
    mean, std = teacher_at(s)
    assert GENERATOR_MEAN + theta.item() == pytest.approx(mean, abs=0.02)
    assert GENERATOR_STD * log_scale.exp().item() == pytest.approx(std, abs=0.02)

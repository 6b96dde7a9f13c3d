"""The mixture's closed forms against autograd, against brute force and against its own samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from benchmarks.claims.mixture.mixture import (
    BANDWIDTHS,
    GaussianMixture,
    VelocityNetwork,
    kernel_distance_to_exact,
    mode_weight_error,
    share_off_modes,
    variance_in_modes,
)
from pdmd_core.flow import score_to_velocity
from pdmd_core.rollout import sample

MIXTURE = GaussianMixture.ring()


def exact(count: int, seed: int = 0) -> Tensor:
    return MIXTURE.sample(count, torch.Generator().manual_seed(seed))


def density(mixture: GaussianMixture) -> MixtureSameFamily:
    deviations = mixture.deviations[:, None].expand(-1, 2)
    return MixtureSameFamily(Categorical(mixture.weights), Independent(Normal(mixture.centres, deviations), 1))


@pytest.mark.parametrize("sigma", [0.02, 0.3, 0.75, 0.999])
def test_the_velocity_is_that_of_the_marginals_score(sigma: float) -> None:
    """The score by autograd through torch's own mixture density of x_sigma."""
    noise = torch.randn(200, 2)
    x = ((1 - sigma) * exact(200) + sigma * noise).requires_grad_()
    (score,) = torch.autograd.grad(density(MIXTURE.marginal(sigma)).log_prob(x).sum(), x)
    expected = score_to_velocity(x.detach(), score, sigma)
    torch.testing.assert_close(MIXTURE.velocity(x.detach(), sigma), expected, rtol=2e-3, atol=2e-3)


def test_the_velocity_at_pure_noise_points_away_from_the_mean() -> None:
    x = torch.randn(50, 2)
    torch.testing.assert_close(MIXTURE.velocity(x, 1.0), x - MIXTURE.weights @ MIXTURE.centres)


def test_a_sigma_for_each_sample_is_a_sigma_for_all() -> None:
    x, sigma = torch.randn(6, 2), torch.rand(6).clamp(min=0.05)
    one_by_one = torch.cat([MIXTURE.velocity(x[i : i + 1], float(sigma[i])) for i in range(6)])
    torch.testing.assert_close(MIXTURE.velocity(x, sigma), one_by_one)


def test_many_steps_of_the_exact_velocity_end_at_the_mixture() -> None:
    sigmas = [1 - i / 200 for i in range(200)]
    found = sample(MIXTURE.velocity, sigmas, torch.randn(4000, 2))
    assert kernel_distance_to_exact(found, MIXTURE) < 4e-4
    assert mode_weight_error(found, MIXTURE) < 0.03
    assert share_off_modes(found, MIXTURE) < 0.01


def test_weights_add_up_and_samples_have_them() -> None:
    assert float(MIXTURE.weights.sum()) == pytest.approx(1)
    samples = exact(20_000)
    assert mode_weight_error(samples, MIXTURE) < 0.012
    assert samples.mean(0).tolist() == pytest.approx((MIXTURE.weights @ MIXTURE.centres).tolist(), abs=0.03)
    mode, away = MIXTURE.nearest_mode(samples)
    # lengths of two-dimensional normal vectors: mean sqrt(pi / 2), mean square 2
    assert float(away.mean()) == pytest.approx(math.sqrt(math.pi / 2), abs=0.02)
    assert float(away.square().mean()) == pytest.approx(2, abs=0.05)
    assert int(mode.max()) == 7


def test_the_share_off_the_modes_is_the_tail_of_a_gaussian() -> None:
    assert share_off_modes(exact(200_000), MIXTURE) == pytest.approx(math.exp(-8), abs=1.5e-4)
    between = torch.tensor([[0.0, 0.0], [1.4, 0.0], [1.4, 0.33], [9.0, 9.0]])  # the first mode has deviation 0.08
    assert share_off_modes(between, MIXTURE) == 0.75


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_the_variance_in_modes_sees_modes_shrink(factor: float) -> None:
    """Twice a Gamma(1) variable cut off at 16: mean (1 - 9 exp(-8)) / (1 - exp(-8)) of its half."""
    samples = exact(50_000)
    centres = MIXTURE.centres[MIXTURE.nearest_mode(samples)[0]]
    found = variance_in_modes(centres + factor * (samples - centres), MIXTURE)
    cut = 1 - 8 * math.exp(-8) / (1 - math.exp(-8)) if factor == 1 else 1.0
    assert found == pytest.approx(factor**2 * cut, rel=0.02)
    strayed = torch.cat([samples, torch.full((500, 2), 30.0)])
    assert variance_in_modes(strayed, MIXTURE) == pytest.approx(variance_in_modes(samples, MIXTURE))
    assert math.isnan(variance_in_modes(torch.zeros(3, 2), MIXTURE))


def test_the_error_of_mode_weights_is_the_share_in_a_wrong_mode() -> None:
    assert mode_weight_error(MIXTURE.centres[:1].repeat(50, 1), MIXTURE) == pytest.approx(1 - 0.26)
    per_mode = (MIXTURE.weights * 100).round().long()
    assert mode_weight_error(MIXTURE.centres.repeat_interleave(per_mode, 0), MIXTURE) == pytest.approx(0, abs=1e-6)
    per_mode[0], per_mode[1] = 16, 14  # ten of a hundred from the first to the second mode
    assert mode_weight_error(MIXTURE.centres.repeat_interleave(per_mode, 0), MIXTURE) == pytest.approx(0.1, abs=1e-6)


# --- kernel distance -------------------------------------------------------------------------------------------------


def kernel(x: Tensor, y: Tensor) -> Tensor:
    squared = (x[:, None].double() - y[None].double()).square().sum(-1)
    return torch.stack([(-squared / (2 * h**2)).exp() for h in BANDWIDTHS]).mean(0)


def test_exact_samples_are_at_distance_zero_on_average() -> None:
    values = torch.tensor([kernel_distance_to_exact(exact(300, seed), MIXTURE) for seed in range(100)])
    assert abs(float(values.mean())) < 3 * float(values.std()) / 10
    assert 0.3 < float((values < 0).double().mean()) < 0.9


def test_the_distance_equals_that_to_very_many_exact_samples() -> None:
    samples, truth = 1.1 * exact(250, 1) + 0.1, exact(6000, 2)
    own, other = kernel(samples, samples), kernel(truth, truth)
    unbiased = (own.sum() - own.trace()) / (250 * 249) + (other.sum() - other.trace()) / (6000 * 5999)
    expected = float(unbiased - 2 * kernel(samples, truth).mean())
    assert kernel_distance_to_exact(samples, MIXTURE) == pytest.approx(expected, rel=0.03)


def test_the_kernel_of_pairs_does_not_depend_on_the_order_or_the_rows_at_a_time() -> None:
    samples = exact(450, 3)  # more than two blocks of rows
    shuffled = samples[torch.randperm(450)]
    first, second = (kernel_distance_to_exact(s, MIXTURE) for s in (samples, shuffled))
    assert first == pytest.approx(second, abs=1e-8)


def test_lost_modes_wrong_weights_and_blur_cost_distance() -> None:
    mode, _ = MIXTURE.nearest_mode(exact(3000))
    samples = exact(3000)
    good = kernel_distance_to_exact(samples, MIXTURE)
    assert kernel_distance_to_exact(samples[mode < 4], MIXTURE) > 0.01 > 10 * abs(good)
    assert kernel_distance_to_exact(samples + 0.1 * torch.randn_like(samples), MIXTURE) > 5e-4
    uniform = GaussianMixture(torch.full((8,), 1 / 8), MIXTURE.centres, MIXTURE.deviations)
    assert kernel_distance_to_exact(uniform.sample(3000, torch.Generator().manual_seed(0)), MIXTURE) > 5e-3


# --- the network -----------------------------------------------------------------------------------------------------


def test_the_network_sees_place_and_sigma() -> None:
    network, x = VelocityNetwork(16), torch.randn(3, 2)
    assert network(x, 0.5).shape == (3, 2)
    torch.testing.assert_close(network(x, 0.5), network(x, torch.full((3,), 0.5)))
    assert (network(x, 0.5) - network(x, 0.6)).abs().min() > 1e-5
    assert (network(x, 0.5) - network(x + 1, 0.5)).abs().min() > 1e-5

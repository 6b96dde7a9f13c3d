"""The losses against Gaussian data, where every conditional mean, velocity and divergence is known in closed form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdmd_core.objectives import (
    RenoisedSamples,
    biased_velocity_target,
    distribution_matching_loss,
    fake_score_loss,
    generator_direction,
    subinterval_velocity_target,
)
from tests.helpers.gaussians import F64, LEVELS, at, coefficients

DATA = {
    "one dimension": ([1.5], [[0.49]]),
    "diagonal": ([1.0, -2.0, 0.5], [[0.25, 0, 0], [0, 2.25, 0], [0, 0, 1]]),
    "correlated": ([1.0, -0.5], [[1.0, 0.6], [0.6, 0.5]]),
}
LATER_LEVELS = [(s, t) for s, t in LEVELS if s > 0]
every_data = pytest.mark.parametrize("data", DATA.values(), ids=DATA)


def gaussian(data) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(data[0], dtype=F64), torch.tensor(data[1], dtype=F64)


def marginal(mean, covariance, sigma):
    """Mean and covariance of x_sigma."""
    return (1 - sigma) * mean, (1 - sigma) ** 2 * covariance + sigma**2 * torch.eye(len(mean), dtype=F64)


def true_velocity(x, mean, covariance, sigma):
    """E[noise - x_0 | x_sigma = x] for Gaussian data; x of shape (batch, dimensions)."""
    centre, spread = marginal(mean, covariance, sigma)
    whitened = torch.linalg.solve(spread, (x - centre).T).T
    return sigma * whitened - (mean + (1 - sigma) * whitened @ covariance)


def mean_target_given_x_t(target, x_t, centre, spread, s, t):
    """E[target(x_s, noise) | x_t = a x_s + b noise] with x_s ~ N(centre, spread), exactly: the targets are linear in
    (x_s, noise), so the mean of the target is the target of the conditional means."""
    a, b = coefficients(s, t)
    joint = a**2 * spread + b**2 * torch.eye(len(centre), dtype=F64)
    whitened = torch.linalg.solve(joint, (x_t - a * centre).T).T
    return target(centre + a * whitened @ spread, b * whitened)


def points(dimensions: int) -> torch.Tensor:
    return 2 * torch.randn(16, dimensions, dtype=F64)


# The fake's target


@given(st.floats(-3, 3), st.floats(-3, 3), st.integers(0, 100))
def test_targets_are_linear_in_sample_and_noise(p, q, seed):
    torch.manual_seed(seed)
    first, second = torch.randn(2, 2, 4, 3, dtype=F64).unbind()
    for target in (lambda x, e: subinterval_velocity_target(x, e, 0.5, 0.8), biased_velocity_target):
        combined = target(*(p * u + q * v for u, v in zip(first, second, strict=True)))
        torch.testing.assert_close(combined, p * target(*first) + q * target(*second))


@every_data
@pytest.mark.parametrize(("s", "t"), LEVELS)
def test_mean_of_the_subinterval_target_is_the_true_marginal_velocity(data, s, t):
    mean, covariance = gaussian(data)
    x_t = points(len(mean))
    found = mean_target_given_x_t(
        lambda x, e: subinterval_velocity_target(x, e, s, t), x_t, *marginal(mean, covariance, s), s, t
    )
    torch.testing.assert_close(found, true_velocity(x_t, mean, covariance, t), rtol=1e-8, atol=1e-8)


@every_data
@pytest.mark.parametrize(("s", "t"), LATER_LEVELS)
def test_mean_of_the_biased_target_is_not_the_true_marginal_velocity(data, s, t):
    mean, covariance = gaussian(data)
    x_t = points(len(mean))
    found = mean_target_given_x_t(biased_velocity_target, x_t, *marginal(mean, covariance, s), s, t)
    assert (found - true_velocity(x_t, mean, covariance, t)).square().mean().sqrt() > 0.1


@every_data
def test_biased_target_is_right_when_the_phase_ends_at_clean_data(data):
    mean, covariance = gaussian(data)
    x_t = points(len(mean))
    found = mean_target_given_x_t(biased_velocity_target, x_t, mean, covariance, 0.0, 0.4)
    torch.testing.assert_close(found, true_velocity(x_t, mean, covariance, 0.4))


@pytest.mark.parametrize(("s", "t"), LATER_LEVELS)
def test_mean_of_the_target_is_the_score_of_whatever_the_generator_makes(s, t):
    centre, spread = torch.tensor([3.0, -1.0], dtype=F64), torch.tensor([[0.02, 0.01], [0.01, 0.3]], dtype=F64)
    x_t = points(2)
    found = mean_target_given_x_t(lambda x, e: subinterval_velocity_target(x, e, s, t), x_t, centre, spread, s, t)
    a, b = coefficients(s, t)
    joint = a**2 * spread + b**2 * torch.eye(2, dtype=F64)
    score = -torch.linalg.solve(joint, (x_t - a * centre).T).T
    torch.testing.assert_close(found, (-t * score - x_t) / (1 - t), rtol=1e-8, atol=1e-8)


@every_data
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.4), (0.5, 0.8), (0.8333, 0.9)])
def test_regression_on_samples_finds_the_true_marginal_velocity_and_refutes_the_biased_target(data, s, t):
    mean, covariance = gaussian(data)
    count, dimensions = 100_000, len(mean)
    x_0 = mean + torch.randn(count, dimensions, dtype=F64) @ torch.linalg.cholesky(covariance).T
    x_s = (1 - s) * x_0 + s * torch.randn_like(x_0)
    noise = torch.randn_like(x_0)
    a, b = coefficients(s, t)
    x_t = a * x_s + b * noise
    inputs = torch.cat([torch.ones(count, 1, dtype=F64), x_t], dim=1)
    basis = torch.eye(dimensions, dtype=F64)
    offset = true_velocity(torch.zeros(1, dimensions, dtype=F64), mean, covariance, t)
    expected = torch.cat([offset, true_velocity(basis, mean, covariance, t) - offset])

    def deviation(target):
        """Distance of the fitted coefficients from the true ones, in standard errors of the fit."""
        gram = inputs.T @ inputs
        fitted = torch.linalg.solve(gram, inputs.T @ target)
        residual = (target - inputs @ fitted).square().mean(0)
        errors = (torch.linalg.inv(gram).diagonal()[:, None] * residual).sqrt()
        return ((fitted - expected) / errors).abs().max()

    assert deviation(subinterval_velocity_target(x_s, noise, s, t)) < 5
    assert (deviation(biased_velocity_target(x_s, noise)) > 50) == (s > 0)


@given(st.floats(0.01, 1))
def test_target_at_clean_data_is_noise_minus_data(t):
    x_0, noise = torch.randn(2, 4, 3, dtype=F64)
    torch.testing.assert_close(subinterval_velocity_target(x_0, noise, 0.0, t), noise - x_0)
    torch.testing.assert_close(biased_velocity_target(x_0, noise), noise - x_0)


@given(st.floats(0, 0.95), st.floats(0.01, 0.99))
def test_the_forms_of_the_target_agree(s, share):
    t = s + (1 - s) * share
    x_s, noise = torch.randn(2, 4, 3, dtype=F64)
    a, b = coefficients(s, t)
    found = subinterval_velocity_target(x_s, noise, s, t)
    x_t = a * x_s + b * noise
    torch.testing.assert_close(found, (t * noise / b - x_t) / (1 - t), rtol=1e-7, atol=1e-7)
    alpha_s, alpha_t, sigma_s, sigma_t = 1 - s, 1 - t, s, t
    general = (alpha_s**2 * sigma_t + alpha_t * sigma_s**2) / (alpha_s**2 * b) * noise - x_s / alpha_s
    torch.testing.assert_close(found, general, rtol=1e-7, atol=1e-7)


def test_target_of_a_batch_of_noise_levels_is_the_target_of_each():
    x_s, noise = torch.randn(2, 3, 2, 4, dtype=F64)
    s, t = torch.tensor([0.0, 0.5, 0.8], dtype=F64), torch.tensor([0.3, 0.6, 0.95], dtype=F64)
    together = subinterval_velocity_target(x_s, noise, s, t)
    for i in range(3):
        alone = subinterval_velocity_target(x_s[i : i + 1], noise[i : i + 1], s[i].item(), t[i].item())
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("t", [0.8, torch.full((4,), 0.8)], ids=["number", "batch"])
def test_half_precision_targets_are_computed_in_float32(t):
    x_s, noise = torch.randn(2, 4, 3).bfloat16()
    for target in (lambda x, e: subinterval_velocity_target(x, e, 0.5, t), biased_velocity_target):
        found = target(x_s, noise)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, target(x_s.float(), noise.float()), rtol=0, atol=0)


# The fake's loss


@pytest.mark.parametrize(("s", "t"), LEVELS)
def test_clamp_weight_is_ten_times_the_transition_variance_up_to_one(s, t):
    x_s, noise, velocity = torch.randn(3, 4, 2, 3, dtype=F64)
    error = (velocity - subinterval_velocity_target(x_s, noise, s, t)).square().mean((1, 2))
    _, b = coefficients(s, t)
    found = fake_score_loss(velocity, RenoisedSamples(x_s, noise, s, t))
    assert found.shape == (4,)
    torch.testing.assert_close(found, min(1, 10 * b**2) * error, rtol=1e-5, atol=0)


def test_clamp_cases_lie_on_both_sides_of_the_clamp():
    variances = [coefficients(s, t)[1] ** 2 for s, t in LEVELS]
    assert min(variances) < 0.1 < max(variances)


@pytest.mark.parametrize("weighting", ["margin", "none"])
def test_other_weightings_leave_the_squared_error_alone(weighting):
    x_s, noise, velocity = torch.randn(3, 4, 2, dtype=F64)
    t = torch.tensor([0.51, 0.6, 0.7, 0.9], dtype=F64)
    expected = (velocity - subinterval_velocity_target(x_s, noise, 0.5, t)).square().mean(1)
    torch.testing.assert_close(fake_score_loss(velocity, RenoisedSamples(x_s, noise, 0.5, t), weighting), expected)


def test_each_sample_is_weighted_by_its_own_noise_level():
    x_s, noise, velocity = torch.randn(3, 2, 3, dtype=F64)
    t = torch.tensor([0.51, 0.9], dtype=F64)
    found = fake_score_loss(velocity, RenoisedSamples(x_s, noise, 0.5, t))
    for i in range(2):
        alone = fake_score_loss(
            velocity[i : i + 1], RenoisedSamples(x_s[i : i + 1], noise[i : i + 1], 0.5, t[i].item())
        )
        torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-5, atol=0)


def test_biased_target_is_an_option_of_the_loss():
    x_s, noise, velocity = torch.randn(3, 4, 2, dtype=F64)
    found = fake_score_loss(velocity, RenoisedSamples(x_s, noise, 0.5, 0.8), "none", target="biased")
    torch.testing.assert_close(found, (velocity - (noise - x_s)).square().mean(1))


def test_fake_loss_gradient_reaches_the_velocity_only():
    x_s, noise, velocity = torch.randn(3, 4, 2, dtype=F64).unbind()
    for tensor in (x_s, noise, velocity):
        tensor.requires_grad_()
    fake_score_loss(velocity, RenoisedSamples(x_s, noise, 0.5, 0.9), "none").sum().backward()
    expected = velocity - subinterval_velocity_target(x_s, noise, 0.5, 0.9)
    torch.testing.assert_close(velocity.grad, expected.detach())
    assert x_s.grad is None
    assert noise.grad is None


# The generator's direction


@given(st.floats(0, 0.95), st.floats(0.02, 0.98))
def test_paper_weight_is_its_alpha_sigma_expression(s, share):
    t = s + (1 - s) * share
    x_t, teacher, fake = torch.randn(3, 4, 3, dtype=F64)
    alpha_t, sigma_t, alpha_ts = 1 - t, t, (1 - t) / (1 - s)
    weight = alpha_t * alpha_ts / (alpha_t * sigma_t + sigma_t**2)
    found = generator_direction(at(x_t, s, t), teacher, fake, "paper")
    torch.testing.assert_close(found, weight * (teacher - fake), rtol=1e-7, atol=1e-9)


def test_dmd2_direction_is_the_x0_difference_over_the_mean_distance_of_each_sample():
    x_t, teacher, fake, x0_generator = torch.randn(4, 3, 2, 4, dtype=F64)
    t = torch.tensor([0.55, 0.7, 0.95], dtype=F64)
    found = generator_direction(at(x_t, 0.5, t), teacher, fake, "dmd2", x0_generator)
    for i in range(3):
        x0_teacher = x_t[i] - t[i] * teacher[i]
        x0_fake = x_t[i] - t[i] * fake[i]
        expected = (x0_fake - x0_teacher) / (x0_generator[i] - x0_teacher).abs().mean()
        torch.testing.assert_close(found[i], expected)


def test_dmd2_direction_does_not_depend_on_s():
    x_t, teacher, fake, x0_generator = torch.randn(4, 3, 2, dtype=F64)
    first = generator_direction(at(x_t, 0.0, 0.8), teacher, fake, "dmd2", x0_generator)
    torch.testing.assert_close(generator_direction(at(x_t, 0.7, 0.8), teacher, fake, "dmd2", x0_generator), first)


def test_dmd2_direction_stays_finite_when_the_generator_is_the_teacher():
    x_t, teacher = torch.randn(2, 3, 2, dtype=F64)
    found = generator_direction(at(x_t, 0.0, 0.5), teacher, teacher + 1e-3, "dmd2", x_t - 0.5 * teacher)
    assert found.isfinite().all()


def test_dmd2_without_the_generators_x0_is_an_error():
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="needs x0_generator"):
        generator_direction(at(x, 0.0, 0.5), x, x)


def test_dmd2_is_the_default_weighting():
    x_t, teacher, fake, x0_generator = torch.randn(4, 3, 2, dtype=F64)
    found = generator_direction(at(x_t, 0.1, 0.5), teacher, fake, x0_generator=x0_generator)
    torch.testing.assert_close(found, generator_direction(at(x_t, 0.1, 0.5), teacher, fake, "dmd2", x0_generator))


def test_half_precision_velocities_are_compared_in_float32():
    x_t, teacher, fake, x0_generator = torch.randn(4, 3, 2).bfloat16()
    wide = [tensor.float() for tensor in (x_t, teacher, fake)]
    for weighting in ("paper", "dmd2"):
        found = generator_direction(at(x_t, 0.5, 0.8), teacher, fake, weighting, x0_generator)
        expected = generator_direction(at(wide[0], 0.5, 0.8), *wide[1:], weighting, x0_generator.float())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_surrogate_gradient_is_the_direction_over_the_elements_of_a_sample():
    x_s = torch.randn(3, 2, 4, dtype=F64, requires_grad=True)
    direction = torch.randn(3, 2, 4, dtype=F64, requires_grad=True)
    loss = distribution_matching_loss(x_s, direction)
    assert loss.shape == (3,)
    torch.testing.assert_close(loss, 0.5 * direction.square().mean((1, 2)))
    loss.sum().backward()
    torch.testing.assert_close(x_s.grad, direction.detach() / 8)
    assert direction.grad is None

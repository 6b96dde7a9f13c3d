import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pdmd_core.flow import (
    at_least_float32,
    euler_step,
    like,
    noise_to_velocity,
    renoise,
    score_to_velocity,
    transition,
    velocity_to_noise,
    velocity_to_score,
    velocity_to_x0,
    x0_to_velocity,
)

inner = st.floats(0.01, 0.99)
seeds = st.integers(0, 1000)


def double(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def pair(seed: int, shape: tuple[int, ...] = (3, 2), dtype: torch.dtype = torch.float64) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


# Transition


@given(st.floats(0, 0.98), st.floats(0.01, 1))
def test_transition_coefficients_are_the_definitions(s, t):
    assume(t - s > 1e-3)
    a, b = transition(double(s), double(t))
    assert a.item() == pytest.approx((1 - t) / (1 - s), rel=1e-12)
    assert b.item() ** 2 == pytest.approx(t**2 - ((1 - t) / (1 - s)) ** 2 * s**2, rel=1e-9)


def test_transition_from_clean_data_is_the_forward_process():
    a, b = transition(0.0, torch.tensor([0.25, 0.5, 1.0]))
    assert a.tolist() == [0.75, 0.5, 0.0]
    assert b.tolist() == [0.25, 0.5, 1.0]


def test_transition_to_the_same_level_changes_nothing():
    a, b = transition(double(0.7), double(0.7))
    assert (a.item(), b.item()) == (1.0, 0.0)


@pytest.mark.parametrize("s", [0.1, 0.625, 0.9375])
@pytest.mark.parametrize("gap", [1e-5, 1e-4, 1e-2])
def test_float32_variance_does_not_cancel_close_to_s(s, gap):
    s, t = torch.tensor(s), torch.tensor(s + gap)
    _, b = transition(s, t)
    s, t = s.double(), t.double()
    exact = (t**2 - ((1 - t) / (1 - s)) ** 2 * s**2).sqrt()
    assert b.dtype == torch.float32
    assert b.item() == pytest.approx(exact.item(), rel=2e-6)


@given(st.floats(0, 0.9), st.floats(0.05, 1), st.floats(0.05, 1))
def test_two_transitions_compose_to_one_in_scale_and_variance(s, x, y):
    t = s + (0.99 - s) * x
    r = t + (1 - t) * y
    a_st, b_st = transition(double(s), double(t))
    a_tr, b_tr = transition(double(t), double(r))
    a_sr, b_sr = transition(double(s), double(r))
    assert (a_tr * a_st).item() == pytest.approx(a_sr.item(), rel=1e-9, abs=1e-12)
    assert (a_tr**2 * b_st**2 + b_tr**2).item() == pytest.approx((b_sr**2).item(), rel=1e-9)


# Renoise


@given(st.floats(0, 0.95), st.floats(0.01, 1), seeds)
def test_renoise_is_the_transition_applied(s, share, seed):
    t = s + (1 - s) * share
    x_s, noise = pair(seed)
    a = (1 - t) / (1 - s)
    expected = a * x_s + (t**2 - a**2 * s**2) ** 0.5 * noise
    torch.testing.assert_close(renoise(x_s, noise, s, t), expected, rtol=1e-9, atol=1e-9)


def test_renoise_from_clean_data_is_interpolation():
    x0, noise = pair(0)
    torch.testing.assert_close(renoise(x0, noise, 0.0, 0.3), 0.7 * x0 + 0.3 * noise)


def test_renoise_to_one_is_pure_noise():
    x_s, noise = pair(0)
    torch.testing.assert_close(renoise(x_s, noise, 0.6, 1.0), noise)


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.4), (0.5, 0.7), (0.83, 0.95)])
def test_renoised_samples_have_the_marginal_moments_of_the_forward_process(s, t):
    count, mean, std = 200_000, 2.0, 0.5
    x0 = mean + std * torch.randn(count, 1, dtype=torch.float64)
    x_s = (1 - s) * x0 + s * torch.randn(count, 1, dtype=torch.float64)
    x_t = renoise(x_s, torch.randn(count, 1, dtype=torch.float64), s, t)
    variance = (1 - t) ** 2 * std**2 + t**2
    assert x_t.mean().item() == pytest.approx((1 - t) * mean, abs=5 * (variance / count) ** 0.5)
    assert x_t.var().item() == pytest.approx(variance, rel=5 * (2 / count) ** 0.5)


# Conversions


@given(inner, seeds)
def test_conversions_of_a_known_path_return_its_ends(sigma, seed):
    x0, noise = pair(seed)
    x, velocity = (1 - sigma) * x0 + sigma * noise, noise - x0
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(velocity_to_x0(x, velocity, sigma), x0, **close)
    torch.testing.assert_close(velocity_to_noise(x, velocity, sigma), noise, **close)
    torch.testing.assert_close(velocity_to_score(x, velocity, sigma), -noise / sigma, **close)
    torch.testing.assert_close(x0_to_velocity(x, x0, sigma), velocity, **close)
    torch.testing.assert_close(noise_to_velocity(x, noise, sigma), velocity, **close)
    torch.testing.assert_close(score_to_velocity(x, -noise / sigma, sigma), velocity, **close)


@pytest.mark.parametrize(
    ("there", "back"),
    [
        (velocity_to_x0, x0_to_velocity),
        (velocity_to_noise, noise_to_velocity),
        (velocity_to_score, score_to_velocity),
    ],
    ids=["x0", "noise", "score"],
)
@given(sigma=inner, seed=seeds)
def test_conversions_invert_each_other(there, back, sigma, seed):
    x, value = pair(seed)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(back(x, there(x, value, sigma), sigma), value, **close)
    torch.testing.assert_close(there(x, back(x, value, sigma), sigma), value, **close)


def test_score_is_the_gradient_of_the_log_density():
    sigma, mean, std = 0.4, 1.5, 0.8
    variance = (1 - sigma) ** 2 * std**2 + sigma**2
    x = torch.linspace(-2, 3, 7, dtype=torch.float64).reshape(-1, 1).requires_grad_()
    log_density = torch.distributions.Normal(double((1 - sigma) * mean), double(variance**0.5)).log_prob(x).sum()
    (score,) = torch.autograd.grad(log_density, x)
    x0_given_x = mean + (1 - sigma) * std**2 / variance * (x.detach() - (1 - sigma) * mean)
    velocity = x0_to_velocity(x.detach(), x0_given_x, sigma)
    torch.testing.assert_close(velocity_to_score(x.detach(), velocity, sigma), score)


@given(inner, inner, seeds)
def test_euler_along_a_straight_path_stays_on_it(sigma, sigma_next, seed):
    x0, noise = pair(seed)
    x, velocity = (1 - sigma) * x0 + sigma * noise, noise - x0
    expected = (1 - sigma_next) * x0 + sigma_next * noise
    torch.testing.assert_close(euler_step(x, velocity, sigma, sigma_next), expected)
    torch.testing.assert_close(euler_step(x, velocity, sigma, 0.0), x0)


# Shapes and types

FUNCTIONS = {
    "renoise": lambda x, y, sigma: renoise(x, y, sigma / 2, sigma),
    "velocity_to_x0": velocity_to_x0,
    "x0_to_velocity": x0_to_velocity,
    "velocity_to_noise": velocity_to_noise,
    "noise_to_velocity": noise_to_velocity,
    "velocity_to_score": velocity_to_score,
    "score_to_velocity": score_to_velocity,
    "euler_step": lambda x, y, sigma: euler_step(x, y, sigma, sigma / 3),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@every_function
@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4, 5)], ids=str)
def test_a_sigma_for_each_sample_is_the_same_as_one_at_a_time(function, shape):
    x, y = pair(0, shape)
    sigmas = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    together = function(x, y, sigmas)
    assert together.shape == shape
    for i, sigma in enumerate(sigmas.tolist()):
        torch.testing.assert_close(together[i : i + 1], function(x[i : i + 1], y[i : i + 1], sigma))


@every_function
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sigma", [0.3, torch.tensor(0.3), torch.full((3,), 0.3)], ids=["number", "scalar", "batch"])
def test_half_precision_is_computed_in_float32(function, dtype, sigma):
    x, y = pair(0, dtype=dtype)
    result = function(x, y, sigma)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, function(x.float(), y.float(), sigma), rtol=0, atol=0)


@every_function
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_precision_network_output_does_not_round_float32_samples(function, dtype):
    x, y = pair(0, dtype=torch.float32)
    y = y.to(dtype)
    torch.testing.assert_close(function(x, y, 0.3), function(x, y.float(), 0.3), rtol=0, atol=0)


@every_function
def test_float64_stays_float64(function):
    x, y = pair(0)
    sigma = torch.full((3,), 0.3, dtype=torch.float64)
    assert function(x, y, 0.3).dtype == torch.float64
    torch.testing.assert_close(function(x, y, 0.3), function(x, y, sigma), rtol=1e-14, atol=1e-14)


FLOATS = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


def test_at_least_float32_widens_only_half_precision():
    widened = {dtype: at_least_float32(torch.ones(1, dtype=dtype)).dtype for dtype in FLOATS}
    assert widened == FLOATS


def test_like_broadcasts_a_batch_of_sigmas_over_samples():
    x = torch.zeros(3, 2, 4, dtype=torch.bfloat16)
    assert like(torch.tensor([0.1, 0.2, 0.3]), x).shape == (3, 1, 1)
    assert like(torch.tensor([0.1, 0.2, 0.3]), x).dtype == torch.float32
    assert like(0.5, x).shape == ()
    assert like(1, x).dtype == torch.float32

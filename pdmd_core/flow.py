"""Rectified flow: ``x_sigma = (1 - sigma) * x_0 + sigma * noise``, velocity ``noise - x_0``.

Pure functions. Every sigma (also called s or t here, s < t, both in [0, 1]) is a number or a tensor of shape (batch,);
samples have shape (batch, ...). Half-precision samples are computed in float32, float64 stays float64.
(Phased DMD, arXiv 2510.27684, equations of section 3.2.)
"""

from __future__ import annotations

import torch
from torch import Tensor

Sigma = float | Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def like(sigma: Sigma, x: Tensor) -> Tensor:
    """Sigma, a number or of shape (batch,), as a tensor that broadcasts against x of shape (batch, ...)."""
    sigma = torch.as_tensor(sigma, device=x.device, dtype=at_least_float32(x).dtype)
    return sigma.reshape(-1, *([1] * (x.ndim - 1))) if sigma.ndim else sigma


def transition(s: Sigma, t: Sigma) -> tuple[Tensor, Tensor]:
    """Scale a = (1-t)/(1-s) and standard deviation b, ``b**2 = t**2 - a**2 s**2``, of ``x_t = a x_s + b noise``.

    b is computed from the factored form (t-s)/(1-s) * (t + a s), which does not cancel as t approaches s.
    """
    s = torch.as_tensor(s)
    t = torch.as_tensor(t)
    a = (1 - t) / (1 - s)
    b = torch.sqrt((t - s) / (1 - s) * (t + a * s))
    return a, b


def renoise(x_s: Tensor, noise: Tensor, s: Sigma, t: Sigma) -> Tensor:
    """Bring samples from noise level s up to t: ``a x_s + b noise``. At s = 0 this is the forward process."""
    x_s, noise = at_least_float32(x_s), at_least_float32(noise)
    a, b = transition(like(s, x_s), like(t, x_s))
    return a * x_s + b * noise


def velocity_to_x0(x: Tensor, velocity: Tensor, sigma: Sigma) -> Tensor:
    """x_0 = x - sigma * velocity."""
    x, velocity = at_least_float32(x), at_least_float32(velocity)
    return x - like(sigma, x) * velocity


def x0_to_velocity(x: Tensor, x0: Tensor, sigma: Sigma) -> Tensor:
    """velocity = (x - x_0) / sigma, for sigma > 0."""
    x = at_least_float32(x)
    return (x - x0) / like(sigma, x)


def velocity_to_noise(x: Tensor, velocity: Tensor, sigma: Sigma) -> Tensor:
    """noise = x + (1 - sigma) * velocity."""
    x, velocity = at_least_float32(x), at_least_float32(velocity)
    return x + (1 - like(sigma, x)) * velocity


def noise_to_velocity(x: Tensor, noise: Tensor, sigma: Sigma) -> Tensor:
    """velocity = (noise - x) / (1 - sigma), for sigma < 1."""
    x = at_least_float32(x)
    return (noise - x) / (1 - like(sigma, x))


def velocity_to_score(x: Tensor, velocity: Tensor, sigma: Sigma) -> Tensor:
    """score = grad log p(x_sigma) = -noise / sigma, for sigma > 0."""
    return -velocity_to_noise(x, velocity, sigma) / like(sigma, x)


def score_to_velocity(x: Tensor, score: Tensor, sigma: Sigma) -> Tensor:
    """The inverse of ``velocity_to_score``, for sigma < 1."""
    return noise_to_velocity(x, -like(sigma, x) * at_least_float32(score), sigma)


def euler_step(x: Tensor, velocity: Tensor, sigma: Sigma, sigma_next: Sigma) -> Tensor:
    """x + (sigma_next - sigma) * velocity."""
    x, velocity = at_least_float32(x), at_least_float32(velocity)
    return x + (like(sigma_next, x) - like(sigma, x)) * velocity

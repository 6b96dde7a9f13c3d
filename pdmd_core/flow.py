"""Rectified flow: ``x_sigma = (1 - sigma) * x_0 + sigma * noise``, with velocity ``noise - x_0``.

These are pure functions. A noise level (sigma, or s and t where two of them meet, s < t) is a number or a tensor of
shape (batch,), in [0, 1]; samples have shape (batch, ...). Half-precision samples are computed in float32, float64
stays float64. (Phased DMD, arXiv 2510.27684, equations of section 3.2.)
"""

from __future__ import annotations

import torch
from torch import Tensor

Sigma = float | Tensor
"""A noise level in [0, 1]: a number, or a tensor of shape (batch,)."""


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32.

    Args:
        x: A tensor of any shape.

    Returns:
        The tensor in float32; float32 and float64 are unchanged.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def like(sigma: Sigma, x: Tensor) -> Tensor:
    """Shape a noise level so that it broadcasts against samples.

    Args:
        sigma: A number or a tensor of shape (batch,), in [0, 1].
        x: Samples of shape (batch, ...).

    Returns:
        Sigma as a tensor in float32 or float64: of shape (batch, 1, ...) on the device of x, or of shape () on the CPU,
        which goes with tensors of any device.
    """
    dtype = at_least_float32(x).dtype
    if not isinstance(sigma, Tensor) or not sigma.ndim:
        return torch.as_tensor(sigma, dtype=dtype)
    return sigma.to(x.device, dtype, non_blocking=True).reshape(-1, *([1] * (x.ndim - 1)))


def of_each_sample(sigma: Sigma, x: Tensor) -> Tensor:
    """Give each sample its noise level, without waiting for the device.

    Args:
        sigma: A number or a tensor of shape (batch,), in [0, 1], on any device.
        x: Samples of shape (batch, ...).

    Returns:
        Sigmas of shape (batch,) in float32 on the device of x.
    """
    if isinstance(sigma, Tensor):
        return sigma.to(x.device, torch.float32, non_blocking=True).expand(len(x))
    return torch.full((len(x),), sigma, dtype=torch.float32, device=x.device)


def transition(s: Sigma, t: Sigma) -> tuple[Tensor, Tensor]:
    """Compute the forward transition from noise level s to t: ``x_t = a x_s + b noise``.

    The scale is ``a = (1-t)/(1-s)``, the standard deviation ``b^2 = t^2 - a^2 s^2``. b is computed from the factored
    form ``(t-s)/(1-s) * (t + a s)``, which does not cancel as t approaches s. Source: Phased DMD, arXiv 2510.27684,
    section 3.2.

    Args:
        s: The lower noise level, in [0, 1), with s <= t.
        t: The higher noise level, in [0, 1].

    Returns:
        The scale a and the standard deviation b, each of shape () or (batch,).

    Examples:
        >>> a, b = transition(0.0, 0.25)  # from clean data: the forward process itself
        >>> float(a), float(b)
        (0.75, 0.25)
        >>> a, b = transition(0.5, 1.0)  # pure noise keeps nothing of x_s
        >>> float(a), float(b)
        (0.0, 1.0)
    """
    s = torch.as_tensor(s)
    t = torch.as_tensor(t)
    a = (1 - t) / (1 - s)
    b = torch.sqrt((t - s) / (1 - s) * (t + a * s))
    return a, b


def renoise(x_s: Tensor, noise: Tensor, s: Sigma, t: Sigma) -> Tensor:
    """Bring samples from noise level s up to t: ``a x_s + b noise``, with a and b of ``transition``.

    At s = 0 this is the forward process.

    Args:
        x_s: Samples at noise level s, of shape (batch, ...).
        noise: Standard normal noise of the same shape.
        s: The noise level of the samples, in [0, 1), with s <= t.
        t: The noise level to reach, in [0, 1].

    Returns:
        Samples at noise level t, of the same shape.
    """
    x_s, noise = at_least_float32(x_s), at_least_float32(noise)
    a, b = transition(like(s, x_s), like(t, x_s))
    return a * x_s + b * noise


def velocity_to_x0(x: Tensor, velocity: Tensor, sigma: Sigma) -> Tensor:
    """Convert a velocity to the clean sample: ``x_0 = x - sigma * velocity``.

    Args:
        x: Samples at noise level sigma, of shape (batch, ...).
        velocity: Velocities of the same shape.
        sigma: The noise level, in [0, 1].

    Returns:
        Clean samples of the same shape.
    """
    x, velocity = at_least_float32(x), at_least_float32(velocity)
    return x - like(sigma, x) * velocity


def x0_to_velocity(x: Tensor, x0: Tensor, sigma: Sigma) -> Tensor:
    """Convert a clean sample to the velocity: ``velocity = (x - x_0) / sigma``.

    Args:
        x: Samples at noise level sigma, of shape (batch, ...).
        x0: Clean samples of the same shape.
        sigma: The noise level, in (0, 1].

    Returns:
        Velocities of the same shape.
    """
    x = at_least_float32(x)
    return (x - x0) / like(sigma, x)


def velocity_to_noise(x: Tensor, velocity: Tensor, sigma: Sigma) -> Tensor:
    """Convert a velocity to the noise: ``noise = x + (1 - sigma) * velocity``.

    Args:
        x: Samples at noise level sigma, of shape (batch, ...).
        velocity: Velocities of the same shape.
        sigma: The noise level, in [0, 1].

    Returns:
        The noise in the samples, of the same shape.
    """
    x, velocity = at_least_float32(x), at_least_float32(velocity)
    return x + (1 - like(sigma, x)) * velocity


def noise_to_velocity(x: Tensor, noise: Tensor, sigma: Sigma) -> Tensor:
    """Convert noise to the velocity: ``velocity = (noise - x) / (1 - sigma)``.

    Args:
        x: Samples at noise level sigma, of shape (batch, ...).
        noise: The noise in the samples, of the same shape.
        sigma: The noise level, in [0, 1).

    Returns:
        Velocities of the same shape.
    """
    x = at_least_float32(x)
    return (noise - x) / (1 - like(sigma, x))


def velocity_to_score(x: Tensor, velocity: Tensor, sigma: Sigma) -> Tensor:
    """Convert a velocity to the score: ``grad log p(x_sigma) = -noise / sigma``.

    Args:
        x: Samples at noise level sigma, of shape (batch, ...).
        velocity: Velocities of the same shape.
        sigma: The noise level, in (0, 1].

    Returns:
        Scores of the same shape.
    """
    return -velocity_to_noise(x, velocity, sigma) / like(sigma, x)


def score_to_velocity(x: Tensor, score: Tensor, sigma: Sigma) -> Tensor:
    """Convert a score to the velocity, the inverse of ``velocity_to_score``.

    Args:
        x: Samples at noise level sigma, of shape (batch, ...).
        score: Scores of the same shape.
        sigma: The noise level, in [0, 1).

    Returns:
        Velocities of the same shape.
    """
    return noise_to_velocity(x, -like(sigma, x) * at_least_float32(score), sigma)


def euler_step(x: Tensor, velocity: Tensor, sigma: Sigma, sigma_next: Sigma) -> Tensor:
    """Take one Euler step: ``x + (sigma_next - sigma) * velocity``.

    Args:
        x: Samples at noise level sigma, of shape (batch, ...).
        velocity: Velocities of the same shape.
        sigma: The noise level of the samples, in [0, 1].
        sigma_next: The noise level to reach, in [0, 1].

    Returns:
        Samples at noise level sigma_next, of the same shape.
    """
    x, velocity = at_least_float32(x), at_least_float32(velocity)
    return x + (like(sigma_next, x) - like(sigma, x)) * velocity

"""The two losses of Phased DMD as pure functions of network outputs.

A phase ends at the noise level s, and its expert makes samples ``x_s`` there. Both losses look at these samples after
they were brought up to a noise level t in (s, 1): the fake score network learns their velocity at t from ``x_s`` alone,
and the generator follows the difference between the velocities of the teacher and of the fake. Samples and velocities
have shape (batch, ...); s and t are sigmas in [0, 1], numbers or tensors of shape (batch,).

Source: Phased DMD, arXiv 2510.27684, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

from .flow import Sigma, at_least_float32, like, renoise, transition, velocity_to_x0

FakeTarget = Literal["unbiased", "biased"]
FakeWeighting = Literal["clamp", "margin", "none"]
GeneratorWeighting = Literal["dmd2", "paper"]


@dataclass(frozen=True)
class RenoisedSamples:
    """Samples at the end of a phase, and the noise that brings them up to where scores are compared."""

    x_s: Tensor
    """Samples of shape (batch, ...) at the noise level ``s``."""
    noise: Tensor
    """Standard normal noise of the shape of ``x_s``."""
    s: Sigma
    """The sigma of ``x_s`` in [0, 1)."""
    t: Sigma
    """The sigma to which the samples are brought, s < t < 1."""

    @cached_property
    def x_t(self) -> Tensor:
        """The samples at ``t``.

        Returns:
            ``a x_s + b noise`` with a and b of ``flow.transition``.
        """
        return renoise(self.x_s, self.noise, self.s, self.t)


def subinterval_velocity_target(x_s: Tensor, noise: Tensor, s: Sigma, t: Sigma) -> Tensor:
    """Compute the velocity target whose mean given ``x_t`` is the true marginal velocity at t.

    The target is ``[t + (1-t) s^2 / (1-s)^2] / b * noise - x_s / (1-s)`` with b of ``flow.transition``; at s = 0 it is
    ``noise - x_0``. No clean sample appears in it, and so an intermediate phase can be trained without bias.

    Args:
        x_s: Samples of shape (batch, ...) at sigma ``s``.
        noise: Standard normal noise of the shape of ``x_s``.
        s: Sigma of the samples in [0, 1).
        t: Sigma of the target, s < t <= 1.

    Returns:
        The target of the shape of ``x_s``, in float32 or better.

    Source: arXiv 2510.27684, section 3.2.
    """
    x_s, noise = at_least_float32(x_s), at_least_float32(noise)
    s, t = like(s, x_s), like(t, x_s)
    _, b = transition(s, t)
    return (t + (1 - t) * (s / (1 - s)) ** 2) / b * noise - x_s / (1 - s)


def biased_velocity_target(x_s: Tensor, noise: Tensor) -> Tensor:
    """Compute ``noise - x_s``, which takes ``x_s`` for clean data: wrong for s > 0, and kept as an ablation.

    Args:
        x_s: Samples of shape (batch, ...) at the end of a phase.
        noise: Standard normal noise of the shape of ``x_s``.

    Returns:
        The target of the shape of ``x_s``, in float32 or better.
    """
    return noise - at_least_float32(x_s)


def fake_score_loss(
    velocity: Tensor, samples: RenoisedSamples, weighting: FakeWeighting = "clamp", target: FakeTarget = "unbiased"
) -> Tensor:
    """Compute the weighted squared error of the fake's velocity at ``samples.x_t``.

    The target grows as 1/b where t approaches s. ``clamp`` weights the squared error by ``min(1, 10 b^2)``, which is
    ``clamp(1/b^2, max=10)`` on the residual scaled by b. ``margin`` and ``none`` weight every t equally; ``margin`` is
    for callers that keep t away from s.

    Args:
        velocity: The fake's velocity at ``samples.x_t``, of shape (batch, ...). It alone carries gradient.
        samples: The generator's samples and where they were renoised to.
        weighting: How errors near the end of the phase are weighted.
        target: ``unbiased``, or ``biased`` as an ablation.

    Returns:
        One loss for each sample, of shape (batch,).

    Source: arXiv 2510.27684, section 3.2.
    """
    x_s, noise, s, t = samples.x_s, samples.noise, samples.s, samples.t
    goal = subinterval_velocity_target(x_s, noise, s, t) if target == "unbiased" else biased_velocity_target(x_s, noise)
    error = (at_least_float32(velocity) - goal.detach()).square().flatten(1).mean(1)
    if weighting != "clamp":
        return error
    _, b = transition(s, t)
    return (10 * b.square()).clamp(max=1).to(error.device, error.dtype, non_blocking=True) * error


def generator_direction(
    samples: RenoisedSamples,
    teacher_velocity: Tensor,
    fake_velocity: Tensor,
    weighting: GeneratorWeighting = "dmd2",
    x0_generator: Tensor | None = None,
) -> Tensor:
    """Compute the gradient with respect to ``x_s`` that the generator descends: ``w * (teacher - fake velocity)``.

    With ``paper``, ``w = (1-t)^2 / ((1-s) t)``, the product of ``alpha_t alpha_{t|s} / (alpha_t sigma_t + sigma_t^2)``.
    With ``dmd2`` the direction is ``(x0_fake - x0_teacher) / mean|x0_generator - x0_teacher|`` in units of x_0, where
    the mean is taken over each sample.

    Args:
        samples: The generator's samples and where they were renoised to.
        teacher_velocity: The guided teacher's velocity at ``samples.x_t``, of shape (batch, ...).
        fake_velocity: The fake's velocity there.
        weighting: ``dmd2`` or ``paper``.
        x0_generator: The generator's own jump to sigma 0, of shape (batch, ...); ``dmd2`` needs it.

    Returns:
        The direction of shape (batch, ...), in float32 or better.

    Raises:
        ValueError: If ``weighting`` is ``dmd2`` and ``x0_generator`` is missing.

    Source: arXiv 2510.27684, section 3.2 (paper); DMD2, arXiv 2405.14867 (dmd2).
    """
    x_t, teacher_velocity, fake_velocity = map(at_least_float32, (samples.x_t, teacher_velocity, fake_velocity))
    difference = teacher_velocity - fake_velocity
    s, t = like(samples.s, x_t), like(samples.t, x_t)
    if weighting == "paper":
        return (1 - t).square() / ((1 - s) * t) * difference
    if x0_generator is None:
        raise ValueError("the dmd2 weighting needs x0_generator, the generator's prediction of x_0")
    x0_teacher = velocity_to_x0(x_t, teacher_velocity, t)
    distance = (x0_generator - x0_teacher).abs().flatten(1).mean(1)
    return t * difference / like(distance.clamp(min=1e-6), x_t)


def distribution_matching_loss(x_s: Tensor, direction: Tensor) -> Tensor:
    """Compute the surrogate whose gradient with respect to ``x_s`` is ``direction / elements``.

    It is ``0.5 * mean((x_s - stop(x_s - direction))^2)`` over the elements of each sample.

    Args:
        x_s: The generator's samples of shape (batch, ...), which carry gradient.
        direction: What ``generator_direction`` gives, of the same shape.

    Returns:
        One loss for each sample, of shape (batch,).
    """
    x_s = at_least_float32(x_s)
    goal = (x_s - direction).detach()
    return 0.5 * (x_s - goal).square().flatten(1).mean(1)

"""The two losses of Phased DMD (arXiv 2510.27684, section 3.2), as pure functions of network outputs.

A phase ends at noise level s; its expert makes samples x_s. The fake score network learns their score at noise levels
t in (s, 1) from x_s alone; the generator follows the difference between the teacher's and the fake's velocity there.
Samples and velocities have shape (batch, ...), sigmas s and t are numbers or tensors of shape (batch,) in [0, 1].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .flow import Sigma, at_least_float32, like, transition, velocity_to_x0

FakeTarget = Literal["unbiased", "biased"]
FakeWeighting = Literal["clamp", "margin", "none"]
GeneratorWeighting = Literal["dmd2", "paper"]


def subinterval_velocity_target(x_s: Tensor, noise: Tensor, s: Sigma, t: Sigma) -> Tensor:
    """The velocity target whose mean given ``x_t = a x_s + b noise`` is the true marginal velocity at t.

    ``[t + (1-t) s^2 / (1-s)^2] / b * noise - x_s / (1-s)``, with b of ``flow.transition``; ``noise - x_0`` at s = 0.
    No clean sample appears: this is what lets an intermediate phase be trained without bias. Needs s < t.
    """
    x_s, noise = at_least_float32(x_s), at_least_float32(noise)
    s, t = like(s, x_s), like(t, x_s)
    _, b = transition(s, t)
    return (t + (1 - t) * (s / (1 - s)) ** 2) / b * noise - x_s / (1 - s)


def biased_velocity_target(x_s: Tensor, noise: Tensor) -> Tensor:
    """``noise - x_s``: takes x_s for clean data. Wrong for s > 0; kept as an ablation."""
    return noise - at_least_float32(x_s)


def fake_score_loss(
    velocity: Tensor,
    x_s: Tensor,
    noise: Tensor,
    s: Sigma,
    t: Sigma,
    weighting: FakeWeighting = "clamp",
    target: FakeTarget = "unbiased",
) -> Tensor:
    """Weighted squared error of the fake's velocity at x_t, one value for each sample: shape (batch,).

    The target grows as 1/b towards t = s. ``clamp`` weights the squared error by ``min(1, 10 b^2)``, that is
    clamp(1/b^2, max=10) on the b-scaled residual; ``margin`` and ``none`` weight every t equally, ``margin`` being
    for callers that keep t away from s.
    """
    goal = subinterval_velocity_target(x_s, noise, s, t) if target == "unbiased" else biased_velocity_target(x_s, noise)
    error = (at_least_float32(velocity) - goal.detach()).square().flatten(1).mean(1)
    if weighting != "clamp":
        return error
    _, b = transition(torch.as_tensor(s, device=error.device), torch.as_tensor(t, device=error.device))
    return (10 * b.square()).clamp(max=1).to(error.dtype) * error


def generator_direction(
    x_t: Tensor,
    teacher_velocity: Tensor,
    fake_velocity: Tensor,
    s: Sigma,
    t: Sigma,
    weighting: GeneratorWeighting = "dmd2",
    x0_generator: Tensor | None = None,
) -> Tensor:
    """The gradient with respect to x_s that the generator descends: ``w * (teacher_velocity - fake_velocity)``.

    paper: ``w = (1-t)^2 / ((1-s) t)``, the product of alpha_t alpha_{t|s} / (alpha_t sigma_t + sigma_t^2).
    dmd2:  in x_0 units, ``(x0_fake - x0_teacher) / mean|x0_generator - x0_teacher|``, the mean over each sample;
           x0_generator is the generator's own jump to sigma 0.
    """
    x_t, teacher_velocity, fake_velocity = map(at_least_float32, (x_t, teacher_velocity, fake_velocity))
    difference = teacher_velocity - fake_velocity
    s, t = like(s, x_t), like(t, x_t)
    if weighting == "paper":
        return (1 - t).square() / ((1 - s) * t) * difference
    if x0_generator is None:
        raise ValueError("the dmd2 weighting needs x0_generator, the generator's prediction of x_0")
    x0_teacher = velocity_to_x0(x_t, teacher_velocity, t)
    distance = (x0_generator - x0_teacher).abs().flatten(1).mean(1)
    return t * difference / like(distance.clamp(min=1e-6), x_t)


def distribution_matching_loss(x_s: Tensor, direction: Tensor) -> Tensor:
    """Stop-gradient surrogate, one value for each sample, shape (batch,): its gradient is ``direction / elements``.

    ``0.5 * mean((x_s - stop(x_s - direction))^2)`` over the elements of each sample; only x_s carries gradient.
    """
    x_s = at_least_float32(x_s)
    goal = (x_s - direction).detach()
    return 0.5 * (x_s - goal).square().flatten(1).mean(1)

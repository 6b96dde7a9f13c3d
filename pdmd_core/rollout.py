"""Backward simulation: the generator's own path from noise, as training and sampling walk it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .flow import euler_step, velocity_to_x0
from .phases import PhasePlan

Velocity = Callable[[Tensor, float], Tensor]
"""A network with its conditioning bound: (x of shape (batch, ...), sigma) -> velocity of the shape of x."""


@dataclass(frozen=True)
class Rollout:
    """What one backward simulation leaves: samples at the end of the phase, and how the last step made them."""

    x_s: Tensor
    """The samples of shape (batch, ...) at ``sigma_end``; they carry gradient when the last step did."""
    x0: Tensor
    """The jump from ``sigma`` to 0 with the same velocity, without gradient."""
    step: int
    """The step inside the phase that trains, from 0."""
    sigma: float
    """The sigma at which the last step was taken."""
    sigma_end: float
    """The sigma s at which the phase ends."""


def simulate(
    experts: Sequence[Velocity],
    plan: PhasePlan,
    phase: int,
    step: int,
    noise: Tensor,
    gradient: bool,
    begun: bool = False,
) -> Rollout:
    """Run the experts from pure noise to the end of a phase; the last jump leaves from a step inside the phase.

    This is stochastic gradient truncation (SGTS): the caller draws the step, and from there the sample jumps straight
    to the end of the phase. Steps before are taken without gradient. Nothing runs past the end of the phase.

    Args:
        experts: One velocity for each phase of the plan.
        plan: The phase plan.
        phase: Index of the phase at whose end the samples are wanted.
        step: The step inside the phase from which the sample jumps, from 0.
        noise: Standard normal noise of shape (batch, ...) at sigma 1.
        gradient: Whether the jump, one network evaluation, is recorded for the backward pass.
        begun: Whether ``noise`` is what ``before_step`` made of noise for the first step of the phase.

    Returns:
        The samples at the end of the phase, and how the last step made them.

    Raises:
        ValueError: If the phase has no such step.

    Source: arXiv 2510.27684, section 3.
    """
    end, _ = plan.interval(phase)
    x = before_step(experts, plan, phase, step, noise, begun)
    sigma = plan.phases[phase].sigmas[step]
    with torch.set_grad_enabled(gradient):
        velocity = experts[phase](x, sigma)
        x_s = euler_step(x, velocity, sigma, end)
    return Rollout(x_s, velocity_to_x0(x, velocity.detach(), sigma), step, sigma, end)


def simulate_whole(
    experts: Sequence[Velocity],
    plan: PhasePlan,
    phase: int,
    step: int,
    noise: Tensor,
    through: bool,
    begun: bool = False,
) -> Rollout:
    """Run the experts from pure noise through all steps of a phase, as sampling does; a step of the phase trains.

    Either the gradient goes through the rest of the phase: all steps from the one that trains are recorded. Or it goes
    to the own increment of the step that trains, ``(following sigma - sigma) * velocity``, and what later steps make of
    it is left out: one network evaluation is recorded.

    Args:
        experts: One velocity for each phase of the plan.
        plan: The phase plan.
        phase: Index of the phase at whose end the samples are wanted.
        step: The step inside the phase that trains, from 0.
        noise: Standard normal noise of shape (batch, ...) at sigma 1.
        through: Whether the gradient goes through the rest of the phase.
        begun: Whether ``noise`` is what ``before_step`` made of noise for the first step of the phase.

    Returns:
        The samples at the end of the phase, with gradient, and how the last step made them.

    Raises:
        ValueError: If the phase has no such step.
    """
    end, _ = plan.interval(phase)
    x = before_step(experts, plan, phase, step, noise, begun)
    steps = list(pairwise([*plan.phases[phase].sigmas[step:], end]))
    increment = None
    for sigma, following in steps:
        with torch.set_grad_enabled(through or increment is None):
            velocity = experts[phase](x, sigma)
            reached = euler_step(x, velocity, sigma, following)
        if not through and increment is None:
            increment = reached
        x0 = velocity_to_x0(x.detach(), velocity.detach(), sigma)
        x = reached if through else reached.detach()
    if increment is not None:
        x = x + (increment - increment.detach())
    return Rollout(x, x0, step, sigma, end)


@torch.no_grad()
def before_step(
    experts: Sequence[Velocity], plan: PhasePlan, phase: int, step: int, noise: Tensor, begun: bool = False
) -> Tensor:
    """Run the experts, without gradient, from pure noise to where a step of a phase begins.

    Args:
        experts: One velocity for each phase of the plan.
        plan: The phase plan.
        phase: Index of the phase.
        step: The step inside the phase, from 0.
        noise: Standard normal noise of shape (batch, ...) at sigma 1.
        begun: Whether ``noise`` is what ``before_step`` made of noise for the first step of the phase.

    Returns:
        Samples of the shape of ``noise`` at the sigma of the step.

    Raises:
        ValueError: If the phase has no such step.
    """
    steps = len(plan.phases[phase].sigmas)
    if not 0 <= step < steps:
        raise ValueError(f"phase {plan.phases[phase].name!r} has steps 0..{steps - 1}, found step {step}")
    earlier = sum(len(p.sigmas) for p in plan.phases[:phase])
    x, first = noise, earlier if begun else 0
    for sigma, following in zip(plan.sigmas[first : earlier + step], plan.sigmas[first + 1 :], strict=False):
        x = euler_step(x, experts[plan.phase_index(sigma)](x, sigma), sigma, following)
    return x


@torch.no_grad()
def sample(
    velocity: Velocity, sigmas: Sequence[float], noise: Tensor, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Sample with Euler steps from noise to sigma 0, without gradient.

    Args:
        velocity: A velocity that routes by its sigma, as ``route`` makes it.
        sigmas: Where the velocity is asked, descending, in (0, 1]; without the final 0.
        noise: The starting point of shape (batch, ...) at ``sigmas[0]``.
        progress: Called after each step with the number of steps that are taken, and of all steps.

    Returns:
        Samples of the shape of ``noise`` at sigma 0.
    """
    x = noise
    following = [*sigmas[1:], 0.0]
    for step, (sigma, after) in enumerate(zip(sigmas, following, strict=True)):
        x = euler_step(x, velocity(x, sigma), sigma, after)
        if progress is not None:
            progress(step + 1, len(sigmas))
    return x


def route(experts: Sequence[Velocity], plan: PhasePlan) -> Velocity:
    """Make one velocity of the experts of a plan, which calls the expert that owns its sigma.

    Args:
        experts: One velocity for each phase of the plan.
        plan: The phase plan.

    Returns:
        A velocity of (x, sigma).
    """
    return lambda x, sigma: experts[plan.phase_index(sigma)](x, sigma)

"""Backward simulation: the generator's own path from noise, as training and sampling walk it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .flow import euler_step, velocity_to_x0
from .phases import PhasePlan

Velocity = Callable[[Tensor, float], Tensor]
"""A network with its conditioning bound: (x of shape (batch, ...), sigma) -> velocity of the shape of x."""


@dataclass(frozen=True)
class Rollout:
    """What one backward simulation leaves: samples at the end of the phase and how the last step made them."""

    x_s: Tensor
    """Samples at ``sigma_end``; carries gradient when the last step did."""
    x0: Tensor
    """The jump from ``sigma`` to 0 with the same velocity, without gradient."""
    sigma: float
    """Where the training step was taken."""
    sigma_end: float
    """s, the end of the phase."""


def simulate(
    experts: Sequence[Velocity], plan: PhasePlan, phase: int, step: int, noise: Tensor, gradient: bool
) -> Rollout:
    """Run experts 0..phase from pure noise to the end of ``phase``; the last jump leaves from ``step`` inside it.

    Steps before are taken without gradient. Stochastic gradient truncation (SGTS): the caller draws ``step`` in
    0..len(sigmas of the phase) - 1, and the jump goes from there straight to the phase's end. With ``gradient`` exactly
    one network evaluation, that jump, is recorded. Nothing runs past the end of the phase.
    """
    end, _ = plan.interval(phase)
    sigmas = plan.phases[phase].sigmas
    if not 0 <= step < len(sigmas):
        raise ValueError(f"phase {plan.phases[phase].name!r} has steps 0..{len(sigmas) - 1}, found step {step}")
    earlier = sum(len(p.sigmas) for p in plan.phases[:phase])
    x = noise
    with torch.no_grad():
        for sigma, following in zip(plan.sigmas[: earlier + step], plan.sigmas[1:], strict=False):
            x = euler_step(x, experts[plan.phase_index(sigma)](x, sigma), sigma, following)
    sigma = sigmas[step]
    with torch.set_grad_enabled(gradient):
        velocity = experts[phase](x, sigma)
        x_s = euler_step(x, velocity, sigma, end)
    return Rollout(x_s, velocity_to_x0(x, velocity.detach(), sigma), sigma, end)


@torch.no_grad()
def sample(
    velocity: Velocity, sigmas: Sequence[float], noise: Tensor, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Euler from noise at ``sigmas[0]`` to 0. The velocity routes by its sigma; ``progress(step, of)`` is optional."""
    x = noise
    following = [*sigmas[1:], 0.0]
    for step, (sigma, after) in enumerate(zip(sigmas, following, strict=True)):
        x = euler_step(x, velocity(x, sigma), sigma, after)
        if progress is not None:
            progress(step + 1, len(sigmas))
    return x


def route(experts: Sequence[Velocity], plan: PhasePlan) -> Velocity:
    """One velocity that calls the expert which owns sigma."""
    return lambda x, sigma: experts[plan.phase_index(sigma)](x, sigma)

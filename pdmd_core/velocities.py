"""Velocities of roles: what networks are asked, the experts of a plan, the guided teacher."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .families import Conditioning
from .flow import Sigma
from .phases import PhasePlan
from .roles import TEACHER
from .rollout import Velocity


class VelocityOfRole(Protocol):
    """What a distiller needs of ``Roles``."""

    def velocity(self, role: str, x: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        """Evaluate a role; see ``Roles.velocity``.

        Args:
            role: The name of a role.
            x: Samples of shape (batch, ...).
            sigma: Their noise level in (0, 1], a number or of shape (batch,).
            conditioning: What the samples are conditioned on.

        Returns:
            The velocity of the shape of ``x``.
        """
        ...

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Combine the teacher's velocities with prompt and negative prompt.

        Args:
            positive: The velocity with the prompt.
            negative: The velocity with the negative prompt.
            scale: The guidance scale.

        Returns:
            The guided velocity.
        """
        ...


def expert_velocities(networks: VelocityOfRole, plan: PhasePlan, conditioning: Conditioning) -> list[Velocity]:
    """Bind the conditioning of a batch to the experts of a plan.

    Args:
        networks: The velocities of the roles.
        plan: The phase plan, whose phases name the experts.
        conditioning: The conditioning of the batch.

    Returns:
        One velocity of (x, sigma) for each phase.
    """

    def expert(role: str) -> Velocity:
        return lambda x, sigma: networks.velocity(role, x, sigma, conditioning)

    return [expert(phase.name) for phase in plan.phases]


def guided_velocity(
    networks: VelocityOfRole,
    x: Tensor,
    sigma: Sigma,
    conditioning: Conditioning,
    negative: Conditioning,
    guidance_scale: float,
    batched: bool = True,
) -> Tensor:
    """Ask the teacher for its velocity, guided away from the negative conditioning.

    Args:
        networks: The velocities of the roles.
        x: Samples of shape (batch, ...) at ``sigma``.
        sigma: Sigma in (0, 1], a number or of shape (batch,).
        conditioning: The conditioning of the samples.
        negative: The same with the negative prompt.
        guidance_scale: Scale of classifier-free guidance. At 1 the teacher is asked once, without the negative prompt.
        batched: Whether both halves are one evaluation of twice the batch, or two, which take less memory.

    Returns:
        The guided velocity of shape (batch, ...).
    """
    if guidance_scale == 1:
        return networks.velocity(TEACHER, x, sigma, conditioning)
    if not batched:
        alone = networks.velocity(TEACHER, x, sigma, conditioning)
        other = networks.velocity(TEACHER, x, sigma, {name: negative[name] for name in conditioning})
        return networks.guide(alone, other, guidance_scale)
    both = {name: torch.cat([value, negative[name]]) for name, value in conditioning.items()}
    twice = torch.cat([sigma, sigma]) if isinstance(sigma, Tensor) and sigma.ndim else sigma
    positive, negative_velocity = networks.velocity(TEACHER, torch.cat([x, x]), twice, both).chunk(2)
    return networks.guide(positive, negative_velocity, guidance_scale)

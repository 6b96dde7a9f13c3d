"""The updates of one phase: which network is asked what, and the two losses that come of it.

``PhasedDistiller`` owns no loop, no optimizer and no files; all randomness comes from the generator it is given.
(Phased DMD, arXiv 2510.27684, algorithm 1.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from .checks import check_choice, check_number
from .families import Conditioning
from .flow import Sigma, renoise
from .noise_level import shift_sigma, unshift_sigma
from .objectives import (
    FakeTarget,
    FakeWeighting,
    GeneratorWeighting,
    distribution_matching_loss,
    fake_score_loss,
    generator_direction,
)
from .phases import PhasePlan
from .roles import FAKE, TEACHER
from .rollout import Rollout, Velocity, simulate

ScoreRange = Literal["nested", "disjoint"]


class VelocityOfRole(Protocol):
    """What a distiller needs of ``Roles``: the velocity of a role at x, sigma, and how the teacher is guided."""

    def velocity(self, role: str, x: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor: ...

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor: ...


@dataclass(frozen=True)
class Objective:
    """The choices of the method that are not the plan; the defaults are the recipe.

    Raises:
        ValueError: A value cannot be; one line that starts with its name.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    guidance_scale: float = 4.0
    """Classifier-free guidance of the teacher; 1 is none. The fake and the experts run without."""
    fake_weighting: FakeWeighting = "clamp"
    """How the fake's squared error is weighted near the end of the phase."""
    fake_target: FakeTarget = "unbiased"
    """What the fake learns; biased is an ablation."""
    generator_weighting: GeneratorWeighting = "dmd2"
    """Weight of the generator's gradient."""
    score_range: ScoreRange = "nested"
    """Noise levels t at which teacher and fake are compared: (s, 1), s the end of the phase; disjoint is only inside
    the phase (ablation)."""
    score_shift: float = 1.0
    """Those t are uniform in raw time under this shift."""
    margin: float = 0.02
    """With fake_weighting margin, t stays this far (relative to the range, in raw time) above s."""

    def __post_init__(self) -> None:
        check_number("guidance_scale", self.guidance_scale, at_least=1)
        check_choice("fake_weighting", self.fake_weighting, FakeWeighting)
        check_choice("fake_target", self.fake_target, FakeTarget)
        check_choice("generator_weighting", self.generator_weighting, GeneratorWeighting)
        check_choice("score_range", self.score_range, ScoreRange)
        check_number("score_shift", self.score_shift, above=0)
        check_number("margin", self.margin, at_least=0, below=1)


class PhasedDistiller:
    """Losses of phase ``phase`` of ``plan``; roles are "teacher", "fake" and the names of the plan's phases."""

    def __init__(
        self,
        plan: PhasePlan,
        phase: int,
        networks: VelocityOfRole,
        objective: Objective,
        guidance_batched: bool = True,
    ) -> None:
        self.plan = plan
        self.phase = phase
        self.networks = networks
        self.objective = objective
        self.guidance_batched = guidance_batched
        self.sigma_end, _ = plan.interval(phase)
        self.score_interval = score_interval(plan, phase, objective.score_range)
        self.score_distance = torch.zeros(())
        """Mean |v_teacher - v_fake| where the last ``generator_loss`` compared them, without gradient."""

    @property
    def expert(self) -> str:
        """The role that this phase trains."""
        return self.plan.phases[self.phase].name

    def draw_step(self, generator: torch.Generator | None = None) -> int:
        """The step inside the phase that trains (SGTS); uniform. Draw it from a generator that all ranks share."""
        steps = len(self.plan.phases[self.phase].sigmas)
        return int(torch.randint(steps, (), generator=generator)) if steps > 1 else 0

    def draw_score_sigma(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Noise levels t, shape (batch,), inside the open range where fake and teacher are compared (CPU tensor)."""
        shift = self.objective.score_shift
        low, high = (unshift_sigma(sigma, shift) for sigma in self.score_interval)
        edge = 1e-4 * (high - low)
        margin = self.objective.margin * (high - low) if self.objective.fake_weighting == "margin" else 0.0
        start = low + max(margin, edge)
        raw = start + (high - edge - start) * torch.rand(batch, generator=generator, dtype=torch.float64)
        shifted = torch.tensor([shift_sigma(float(u), shift) for u in raw], dtype=torch.float32)
        return self._checked(shifted)

    def _checked(self, t: Tensor) -> Tensor:
        low, high = self.score_interval
        if not bool(((t > low) & (t < high + 1e-6)).all()):
            raise ValueError(
                f"phase {self.expert!r} compares scores at sigmas in ({low}, {high}), "
                f"found {float(t.min())} to {float(t.max())}: the fake was never trained there"
            )
        return t

    def rollout(self, noise: Tensor, conditioning: Conditioning, step: int, gradient: bool) -> Rollout:
        """Backward simulation to the end of the phase; see ``rollout.simulate``."""
        experts = expert_velocities(self.networks, self.plan, conditioning)
        return simulate(experts, self.plan, self.phase, step, noise, gradient)

    def fake_loss(self, x_s: Tensor, conditioning: Conditioning, t: Tensor, noise: Tensor) -> Tensor:
        """Score matching of the fake on the generator's samples x_s; mean over the batch. Gradient: the fake only."""
        s = self.sigma_end
        t = self._checked(t).to(x_s.device)
        x_s = x_s.detach()
        velocity = self.networks.velocity(FAKE, renoise(x_s, noise, s, t), t, conditioning)
        loss = fake_score_loss(velocity, x_s, noise, s, t, self.objective.fake_weighting, self.objective.fake_target)
        return loss.mean()

    def generator_loss(
        self, rollout: Rollout, conditioning: Conditioning, negative: Conditioning, t: Tensor, noise: Tensor
    ) -> Tensor:
        """Distribution matching at x_s of a rollout with gradient; mean over the batch. Gradient: the expert only."""
        s = self.sigma_end
        t = self._checked(t).to(rollout.x_s.device)
        with torch.no_grad():
            x_t = renoise(rollout.x_s.detach(), noise, s, t)
            teacher = self.teacher_velocity(x_t, t, conditioning, negative)
            fake = self.networks.velocity(FAKE, x_t, t, conditioning)
            self.score_distance = (teacher.float() - fake.float()).abs().mean()
            direction = generator_direction(
                x_t, teacher, fake, s, t, self.objective.generator_weighting, x0_generator=rollout.x0
            )
        return distribution_matching_loss(rollout.x_s, direction).mean()

    def teacher_velocity(self, x: Tensor, sigma: Sigma, conditioning: Conditioning, negative: Conditioning) -> Tensor:
        """The teacher with classifier-free guidance."""
        scale = self.objective.guidance_scale
        return guided_velocity(self.networks, x, sigma, conditioning, negative, scale, self.guidance_batched)


def score_interval(plan: PhasePlan, phase: int, score_range: ScoreRange) -> tuple[float, float]:
    """(low, high), both excluded: the sigmas at which the teacher and the fake of this phase are compared."""
    end, start = plan.interval(phase)
    return end, start if score_range == "disjoint" else 1.0


def expert_velocities(networks: VelocityOfRole, plan: PhasePlan, conditioning: Conditioning) -> list[Velocity]:
    """The experts of a plan as velocities of (x, sigma), the conditioning bound."""

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
    """The teacher's velocity, guided away from the negative conditioning; one evaluation without it at scale 1.

    batched: both halves in one evaluation of twice the batch, or in two, which take less memory.
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


def evaluations_per_update(plan: PhasePlan, phase: int, fake_updates: int, fake_draws: int) -> dict[str, float]:
    """Network evaluations of one generator update of a phase on average over SGTS steps, by what they are for.

    Guidance counts as one evaluation of twice the batch. Keys: rollout, fake (with gradient), generator (with
    gradient), teacher, fake_score.
    """
    earlier = sum(len(p.sigmas) for p in plan.phases[:phase])
    steps: Sequence[float] = plan.phases[phase].sigmas
    before = earlier + (len(steps) - 1) / 2
    return {
        "rollout": fake_updates * (before + 1) + before,
        "fake": float(fake_updates * fake_draws),
        "generator": 1.0,
        "teacher": 1.0,
        "fake_score": 1.0,
    }

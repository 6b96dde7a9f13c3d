"""The updates of one phase: which network is asked what, and the two losses that come of it.

``PhasedDistiller`` owns no loop, no optimizer and no files, and all randomness comes from the generator that it is
given.

Source: Phased DMD, arXiv 2510.27684, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .batch import Batch, Renoising
from .families import Conditioning
from .flow import Sigma, euler_step
from .method import Objective, ScoreRange, fake_of_step
from .noise_level import shift_sigma, unshift_sigma
from .objectives import (
    RenoisedSamples,
    distribution_matching_loss,
    fake_score_loss,
    generator_direction,
)
from .phases import PhasePlan
from .roles import FAKE
from .rollout import Rollout, before_step, simulate, simulate_whole
from .velocities import VelocityOfRole, expert_velocities, guided_velocity


@dataclass(frozen=True)
class GeneratorLoss:
    """The generator's loss, and what was measured on the way."""

    loss: Tensor
    """The mean over the batch, which carries gradient."""
    score_distance: Tensor
    """Mean of ``|v_teacher - v_fake|``, without gradient: how far the fake is from the teacher."""


class PhasedDistiller:
    """The losses of one phase of a plan. It owns no weights.

    The roles are "teacher", those of ``fake_roles`` and the plan's phases.

    Args:
        plan: The phase plan.
        phase: Index of the phase that trains.
        networks: The velocities of the roles.
        objective: The choices of the method.
        guidance_batched: Whether the guided teacher sees prompt and negative prompt in one batch.
    """

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
        """The sigma s at which the phase ends."""
        self.score_interval = score_interval(plan, phase, "disjoint" if self.denoises else objective.score_range)
        """The open range of sigmas at which teacher and fake are compared, or at which an expert learns to denoise."""

    @property
    def expert(self) -> str:
        """The role that this phase trains."""
        return self.plan.phases[self.phase].name

    @property
    def fakes(self) -> tuple[str, ...]:
        """The roles of the fakes of this phase, with ``per_step`` one for each step; none without matching."""
        if self.objective.expert_loss != "matching":
            return ()
        steps = len(self.plan.phases[self.phase].sigmas)
        return tuple(map(fake_of_step, range(steps if self.objective.fake_rollouts == "per_step" else 1)))

    @property
    def regresses(self) -> bool:
        """Whether ``path_loss`` trains the expert, in place of a fake and ``generator_loss``."""
        return self.objective.expert_loss == "regression"

    @property
    def denoises(self) -> bool:
        """Whether ``denoising_loss`` trains the expert, in place of a fake and ``generator_loss``."""
        return self.objective.expert_loss == "denoising"

    def fake_of(self, step: int) -> str:
        """Name the fake that knows rollouts of a step.

        Args:
            step: A step inside the phase.

        Returns:
            The role.
        """
        return self.fakes[step] if self.objective.fake_rollouts == "per_step" else FAKE

    def draw_step(self, generator: torch.Generator | None = None) -> int:
        """Draw the step inside the phase that trains (stochastic gradient truncation), uniformly.

        Args:
            generator: A generator in the same state on all processes, since the step is one for a whole batch.

        Returns:
            The index of a step of the phase.
        """
        steps = len(self.plan.phases[self.phase].sigmas)
        return int(torch.randint(steps, (), generator=generator)) if steps > 1 else 0

    def draw_score_sigma(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw noise levels inside the open range where fake and teacher are compared.

        Args:
            batch: How many.
            generator: Of the draws; torch's own when None.

        Returns:
            Sigmas of shape (batch,) on the CPU, uniform in raw time under the objective's ``score_shift``.
        """
        return self.score_sigma_at(torch.rand(batch, generator=generator, dtype=torch.float64))

    def score_sigma_at(self, share: Tensor) -> Tensor:
        """Find the noise level below which a share of all drawn ones lies, the inverse of ``score_share_below``.

        Args:
            share: Of shape (batch,) in [0, 1], on the CPU. Uniform shares make the sigmas of ``draw_score_sigma``.

        Returns:
            Sigmas of shape (batch,) on the CPU.
        """
        start, end = self._raw_scores
        raw = start + (end - start) * share
        shifted = torch.tensor([shift_sigma(float(u), self.objective.score_shift) for u in raw], dtype=torch.float32)
        return self._checked(shifted)

    def score_share_below(self, sigma: float) -> float:
        """Tell which share of the drawn noise levels lies below one.

        Args:
            sigma: The noise level in [0, 1].

        Returns:
            The share in [0, 1].
        """
        start, end = self._raw_scores
        return min(max((unshift_sigma(sigma, self.objective.score_shift) - start) / (end - start), 0.0), 1.0)

    @property
    def _raw_scores(self) -> tuple[float, float]:
        """The raw times between which noise levels are drawn, inside the open range."""
        low, high = (unshift_sigma(sigma, self.objective.score_shift) for sigma in self.score_interval)
        edge = 1e-4 * (high - low)
        of_fake = self.objective.fake_weighting == "margin" and bool(self.fakes)
        margin = self.objective.margin * (high - low) if of_fake else 0.0
        return low + max(margin, edge), high - edge

    def _checked(self, t: Tensor) -> Tensor:
        low, high = self.score_interval
        if not bool(((t > low) & (t < high + 1e-6)).all()):
            does, why = ("learns", "") if self.denoises else ("compares scores", ": the fake was never trained there")
            found = f"{float(t.min())} to {float(t.max())}"
            raise ValueError(f"phase {self.expert!r} {does} at sigmas in ({low}, {high}), found {found}{why}")
        return t

    def fake_rollout(self, batch: Batch, step: int) -> Tensor:
        """Run the experts from noise to the end of the phase, without gradient: what the fake learns.

        Args:
            batch: What the rollout starts from.
            step: The step inside the phase that was drawn. The rollout jumps from there to the end of the phase, but
                where the fake learns whole rollouts.

        Returns:
            Samples of shape (batch, ...) at the end of the phase.
        """
        experts = expert_velocities(self.networks, self.plan, batch.conditioning)
        if self.objective.fake_rollouts == "whole":
            step = len(self.plan.phases[self.phase].sigmas) - 1
        return simulate(experts, self.plan, self.phase, step, batch.noise, False, batch.begun).x_s

    def expert_rollout(self, batch: Batch, step: int) -> Rollout:
        """Run the experts from noise to the end of the phase, with gradient for the step that trains.

        Args:
            batch: What the rollout starts from.
            step: The step inside the phase that was drawn.

        Returns:
            The samples at the end of the phase and how the last step made them; see ``rollout.simulate`` and
            ``rollout.simulate_whole``.
        """
        experts = expert_velocities(self.networks, self.plan, batch.conditioning)
        how = self.objective.expert_rollouts
        if how == "truncated":
            return simulate(experts, self.plan, self.phase, step, batch.noise, True, batch.begun)
        return simulate_whole(experts, self.plan, self.phase, step, batch.noise, how == "through", batch.begun)

    def path_loss(self, batch: Batch, step: int) -> Tensor:
        """Regression of a step of the expert on the teacher's path. Only the expert gets gradient.

        From where rollouts begin the step, the guided teacher goes to where it ends, in ``path_steps`` Euler steps of
        equal length in sigma. The expert learns the mean velocity of that path, with which one step gets there.

        Args:
            batch: What the rollout starts from.
            step: The step inside the phase that was drawn.

        Returns:
            The mean squared error of the expert's velocity.

        Raises:
            ValueError: If the phase has no such step.

        Source: as PeRFlow trains a segment, arXiv 2405.07510, but from where the experts' own rollouts begin it.
        """
        experts = expert_velocities(self.networks, self.plan, batch.conditioning)
        start = before_step(experts, self.plan, self.phase, step, batch.noise, batch.begun)
        sigma, end, *_ = [*self.plan.phases[self.phase].sigmas[step:], self.sigma_end]
        x = self._walk(start, [sigma, end], batch)
        return (experts[self.phase](start, sigma).float() - (x - start).float() / (end - sigma)).square().mean()

    def teacher_samples(self, batch: Batch) -> Tensor:
        """Sample the guided teacher, at the sigmas of all phases of the plan, in ``path_steps`` Euler steps for each.

        Args:
            batch: Noise, conditioning and the negative one; what has begun are such samples.

        Returns:
            Clean samples of shape (batch, ...), without gradient.
        """
        return batch.noise if batch.begun else self._walk(batch.noise, [*self.plan.sigmas, 0.0], batch)

    def denoising_loss(self, batch: Batch, renoising: Renoising) -> Tensor:
        """Score matching of the expert on what the guided teacher samples. Only the expert gets gradient.

        A guided velocity is that of no distribution: what matches it at all noise levels goes further than the guided
        teacher does. The velocity that is learned here is that of its samples, and can be matched.

        Args:
            batch: What the teacher samples from, or its samples.
            renoising: Noise levels inside the phase, and noise.

        Returns:
            The mean squared error of the expert's velocity.

        Raises:
            ValueError: If a sigma lies outside the phase.
        """
        samples = RenoisedSamples(self.teacher_samples(batch), renoising.noise, 0.0, self._checked(renoising.t))
        velocity = self.networks.velocity(self.expert, samples.x_t, samples.t, batch.conditioning)
        return fake_score_loss(velocity, samples, "none").mean()

    @torch.no_grad()
    def _walk(self, x: Tensor, sigmas: Sequence[float], batch: Batch) -> Tensor:
        """The guided teacher's path from sigma to sigma, in ``path_steps`` Euler steps of equal length for each."""
        count = self.objective.path_steps
        for start, end in pairwise(sigmas):
            for a, b in pairwise([*(start + (end - start) * i / count for i in range(count)), end]):
                x = euler_step(x, self._guided(x, a, batch), a, b)
        return x

    def fake_loss(self, x_s: Tensor, conditioning: Conditioning, renoising: Renoising, role: str = FAKE) -> Tensor:
        """Score matching of a fake on the generator's samples. Only that fake gets gradient.

        Args:
            x_s: Samples of shape (batch, ...) at the end of the phase.
            conditioning: Their conditioning.
            renoising: Where they are brought to.
            role: The fake, that of the step from which they jumped.

        Returns:
            The mean loss over the batch.

        Raises:
            ValueError: If a sigma lies where scores of this phase are not compared.
        """
        samples = self._renoised(x_s.detach(), renoising)
        velocity = self.networks.velocity(role, samples.x_t, samples.t, conditioning)
        return fake_score_loss(velocity, samples, self.objective.fake_weighting, self.objective.fake_target).mean()

    def generator_loss(self, rollout: Rollout, batch: Batch, *renoisings: Renoising) -> GeneratorLoss:
        """Distribution matching on the samples of a rollout with gradient. Only the expert gets gradient.

        Args:
            rollout: Samples of ``expert_rollout`` at the end of the phase.
            batch: What the rollout started from.
            *renoisings: Where the samples are brought to; the directions found there are averaged.

        Returns:
            The mean loss over the batch, and the distance of the scores.

        Raises:
            ValueError: If a sigma lies where scores of this phase are not compared.
        """
        found = [self._direction(rollout, batch, renoising) for renoising in renoisings]
        direction, distance = (torch.stack(values).mean(0) for values in zip(*found, strict=True))
        return GeneratorLoss(distribution_matching_loss(rollout.x_s, direction).mean(), distance)

    @torch.no_grad()
    def _direction(self, rollout: Rollout, batch: Batch, renoising: Renoising) -> tuple[Tensor, Tensor]:
        """The direction of the generator at one draw of t and noise, and the distance of the scores there."""
        samples = self._renoised(rollout.x_s.detach(), renoising)
        teacher = self.teacher_velocity(samples, batch)
        fake = self.networks.velocity(self.fake_of(rollout.step), samples.x_t, samples.t, batch.conditioning)
        weighting = self.objective.generator_weighting
        direction = generator_direction(samples, teacher, fake, weighting, x0_generator=rollout.x0)
        return direction, (teacher.float() - fake.float()).abs().mean()

    def teacher_velocity(self, samples: RenoisedSamples, batch: Batch) -> Tensor:
        """Ask the teacher, with classifier-free guidance, at renoised samples.

        Args:
            samples: The samples at the sigmas where scores are compared.
            batch: Their conditioning and the negative one.

        Returns:
            The guided velocity of shape (batch, ...).
        """
        return self._guided(samples.x_t, samples.t, batch)

    def _guided(self, x: Tensor, sigma: Sigma, batch: Batch) -> Tensor:
        sides, scale = (batch.conditioning, batch.negative), self.objective.guidance_scale
        return guided_velocity(self.networks, x, sigma, *sides, scale, self.guidance_batched)

    def _renoised(self, x_s: Tensor, renoising: Renoising) -> RenoisedSamples:
        return RenoisedSamples(x_s, renoising.noise, self.sigma_end, self._checked(renoising.t))


def score_interval(plan: PhasePlan, phase: int, score_range: ScoreRange) -> tuple[float, float]:
    """Find the sigmas at which the teacher and the fake of a phase are compared.

    Args:
        plan: The phase plan.
        phase: Index of the phase.
        score_range: ``nested``, from the end of the phase to 1; ``disjoint``, only inside the phase.

    Returns:
        (low, high) in [0, 1], both excluded.
    """
    end, start = plan.interval(phase)
    return end, start if score_range == "disjoint" else 1.0

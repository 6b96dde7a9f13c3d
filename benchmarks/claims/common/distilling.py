"""The training loop of every method on every teacher: what ``PhasedDistiller`` leaves to its caller."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from benchmarks.claims.common.methods import Run
from pdmd_core.distillation import Objective, PhasedDistiller, VelocityOfRole
from pdmd_core.families.base import Conditioning
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import FAKE


@dataclass(frozen=True)
class Recipe:
    """What all methods share."""

    batch_size: int
    fake_updates: int
    """Rollouts that the fake learns from, for each generator update."""
    draws_per_rollout: int
    """Gradient steps of the fake on one of them, each with noise of its own."""
    fake_lr_factor: float
    """Learning rate of the fake, as a multiple of the generator's."""
    ema_decay: float
    ema_warm_up: bool
    """The average is over few updates at first: its decay is at most (1 + n) / (10 + n) after n updates."""
    lr_decay_share: float
    """The last share of the updates of a phase over which learning rates fall to 0."""
    max_grad_norm: float


@dataclass(frozen=True)
class Draw:
    """What one rollout starts from, (batch, ...)."""

    noise: Tensor
    conditioning: Conditioning
    negative: Conditioning


class PhaseNetworks(VelocityOfRole, Protocol):
    """The networks as one phase sees them: teacher, experts, and FAKE is this phase's own."""

    def parameters(self, role: str) -> list[nn.Parameter]: ...


class Problem(Protocol):
    """A teacher with the untrained networks of one run on it."""

    plan: PhasePlan
    objective: Objective

    def networks(self, phase: int) -> PhaseNetworks:
        """Of a phase that is about to be trained, with a new fake."""
        ...

    def draw(self, count: int, generator: torch.Generator) -> Draw: ...


class Average:
    """Exponential moving average of parameters over updates; starts at those of the first."""

    def __init__(self, decay: float, warm_up: bool) -> None:
        self.decay, self.warm_up = decay, warm_up
        self.updates = 0
        self.values: list[Tensor] = []

    def update(self, parameters: list[nn.Parameter]) -> None:
        """Take in the parameters as they are now."""
        now = [parameter.detach() for parameter in parameters]
        if self.updates == 0:
            self.values = [value.clone() for value in now]
        else:
            bound = (1 + self.updates) / (10 + self.updates) if self.warm_up else 1.0
            torch._foreach_lerp_(self.values, now, 1 - min(self.decay, bound))
        self.updates += 1

    def copy_to(self, parameters: list[nn.Parameter]) -> None:
        """Make the average the parameters."""
        with torch.no_grad():
            for parameter, value in zip(parameters, self.values, strict=True):
                parameter.copy_(value)


class PhaseTraining:
    """Optimizers, average and updates of one phase."""

    def __init__(self, problem: Problem, phase: int, run: Run, recipe: Recipe, generator: torch.Generator) -> None:
        self.problem, self.recipe, self.generator = problem, recipe, generator
        networks = problem.networks(phase)
        self.distiller = PhasedDistiller(problem.plan, phase, networks, problem.objective)
        self.updates = run.updates // len(problem.plan)
        self.expert = networks.parameters(self.distiller.expert)
        self.fake = networks.parameters(FAKE)
        self.average = Average(recipe.ema_decay, recipe.ema_warm_up)
        self.optimizers = [
            torch.optim.AdamW(parameters, lr=lr, betas=(0.0, 0.999), weight_decay=0.01)
            for parameters, lr in ((self.expert, run.lr), (self.fake, recipe.fake_lr_factor * run.lr))
        ]
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, self._lr_factor) for o in self.optimizers]
        self.skipped = 0

    def _lr_factor(self, update: int) -> float:
        return min(1.0, (self.updates - update) / (self.recipe.lr_decay_share * self.updates))

    def update(self) -> None:
        """Fake updates, then one of the expert."""
        distiller, recipe, generator = self.distiller, self.recipe, self.generator
        expert, fake = self.optimizers
        for _ in range(recipe.fake_updates):
            draw = self.problem.draw(recipe.batch_size, generator)
            rollout = distiller.rollout(draw.noise, draw.conditioning, distiller.draw_step(generator), gradient=False)
            for _ in range(recipe.draws_per_rollout):
                t = distiller.draw_score_sigma(recipe.batch_size, generator)
                loss = distiller.fake_loss(rollout.x_s, draw.conditioning, t, self._noise_like(rollout.x_s))
                self._step(fake, loss)
        draw = self.problem.draw(recipe.batch_size, generator)
        rollout = distiller.rollout(draw.noise, draw.conditioning, distiller.draw_step(generator), gradient=True)
        t = distiller.draw_score_sigma(recipe.batch_size, generator)
        noise = self._noise_like(rollout.x_s)
        self._step(expert, distiller.generator_loss(rollout, draw.conditioning, draw.negative, t, noise))
        self.average.update(self.expert)
        for schedule in self.schedules:
            schedule.step()

    def _noise_like(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self.generator)

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        parameters = optimizer.param_groups[0]["params"]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.recipe.max_grad_norm)
        if math.isfinite(float(norm)):
            optimizer.step()
        else:
            self.skipped += 1

    def finish(self) -> None:
        """The average becomes the expert, which is frozen from now on."""
        self.average.copy_to(self.expert)
        for parameter in self.expert:
            parameter.requires_grad_(False)


def distil(problem: Problem, run: Run, recipe: Recipe) -> Iterator[int]:
    """Train all experts of a run in place. Equal runs give equal experts.

    Every phase gets the same number of updates, ``run.updates`` in all. One phase after the other; a joint method takes
    one update of each in turn. Yields after each update how many were skipped so far: their gradient was NaN or Inf.
    """
    generator = torch.Generator().manual_seed(run.seed)
    phases = range(len(problem.plan))
    skipped = 0
    for together in [list(phases)] if run.method.joint else [[phase] for phase in phases]:
        trainings = [PhaseTraining(problem, phase, run, recipe, generator) for phase in together]
        for _ in range(trainings[0].updates):
            for training in trainings:
                training.update()
                yield skipped + sum(training.skipped for training in trainings)
        for training in trainings:
            training.finish()
            skipped += training.skipped

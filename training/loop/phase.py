"""The training of one phase: its losses, its optimizers, the average of its expert."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from pdmd_core.distillation import PhasedDistiller
from pdmd_core.families import Conditioning
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import FAKE, Roles
from training.config.schema import DistillConfig
from training.config.sections import RoleSection
from training.data.prompt_cache import PromptCache
from training.distributed.sharding import average_gradients, gathered
from training.loop.optimizers import make_optimizer, set_rate
from training.loop.rng import RunRNG
from training.memory.offload import keep_idle_experts_away

Rows = slice | Tensor
"""Some of the samples of a process."""


@dataclass(frozen=True)
class Batches:
    """What samples are made of."""

    prompts: PromptCache
    shapes: Sequence[tuple[int, ...]]
    """Of a latent in each bucket."""


@dataclass(frozen=True)
class Update:
    """What one update did: numbers over all processes, and where the samples of this one were."""

    values: dict[str, float]
    """Losses and gradient norms by name; NaN where a step was skipped."""
    good: bool
    """Whether every step was taken."""
    sigmas: dict[str, list[float]] = field(default_factory=dict)
    """Noise levels at which the scores were asked, by role that was trained there: fake, generator."""


class PhaseTraining:
    """Phase ``phase`` of the plan in training. Starting it resets nothing and freezes every other role."""

    def __init__(
        self, config: DistillConfig, plan: PhasePlan, phase: int, roles: Roles, accelerator: Accelerator
    ) -> None:
        self.config, self.roles, self.accelerator = config, roles, accelerator
        self.device = accelerator.device
        self.batch = config.batch_size // config.groups(accelerator.num_processes)
        """Samples of this process, or of the group of processes that share them."""
        self.distiller = PhasedDistiller(plan, phase, roles, config.objective, config.memory.guidance_batched)
        self.sections: dict[str, RoleSection] = {self.expert: config.generator, FAKE: config.fake}
        roles.set_trainable(self.sections)
        if config.memory.offload_idle_experts:
            keep_idle_experts_away(roles, self.expert, self.device)
        self.optimizers = {
            role: make_optimizer(roles.parameters(role), section, self.device)
            for role, section in self.sections.items()
        }
        decay = config.ema_decay
        self.average = EMAModel(roles.parameters(self.expert), decay=decay) if decay else None

    @property
    def expert(self) -> str:
        """The expert that this phase trains."""
        return self.distiller.expert

    def update(self, draws: RunRNG, source: Batches, lr_factor: float) -> Update:
        """Fake updates, then one generator update. lr_factor: of both learning rates."""
        config, distiller = self.config, self.distiller
        for role, section in self.sections.items():
            set_rate(self.optimizers[role], section.lr * lr_factor)
        fake_losses, fake_norms = [], []
        sigmas: dict[str, list[float]] = {"fake": [], "generator": []}
        for _ in range(config.fake_updates):
            indices, noise = self._draw(draws, source)
            conditioning = source.prompts.conditioning(indices, self.device)
            x_s = self._rollout(noise, conditioning, distiller.draw_step(draws.shared))
            for _ in range(config.draws_per_rollout):
                t, renoise = self._draw_score(draws, noise)
                value, norm = self._train(FAKE, t, partial(self._fake_loss, x_s, conditioning, t, renoise))
                fake_losses.append(value)
                fake_norms.append(norm)
                sigmas["fake"] += t.tolist()
        indices, noise = self._draw(draws, source)
        conditioning = source.prompts.conditioning(indices, self.device)
        negative = source.prompts.negative_conditioning(indices, self.device)
        step = distiller.draw_step(draws.shared)
        t, renoise = self._draw_score(draws, noise)
        self._distance = torch.zeros((), device=self.device)
        loss_of = partial(self._generator_loss, noise, conditioning, negative, step, t, renoise)
        loss, norm = self._train(self.expert, t, loss_of)
        sigmas["generator"] += t.tolist()
        if self.average is not None and math.isfinite(norm):
            self.average.step(self.roles.parameters(self.expert))
        values = {
            "generator_loss": loss,
            "fake_loss": sum(fake_losses) / len(fake_losses),
            "generator_grad_norm": norm,
            "fake_grad_norm": sum(fake_norms) / len(fake_norms),
            "score_distance": float(self.accelerator.reduce(self._distance, "mean")),
        }
        return Update(values, all(map(math.isfinite, [norm, *fake_norms])), sigmas)

    def _draw(self, draws: RunRNG, source: Batches) -> tuple[Tensor, Tensor]:
        bucket, indices = draws.examples()
        return indices, draws.noise(source.shapes[bucket]).to(self.device)

    def _draw_score(self, draws: RunRNG, like: Tensor) -> tuple[Tensor, Tensor]:
        return draws.score_sigmas(self.distiller), draws.noise(like.shape[1:]).to(self.device)

    def _rollout(self, noise: Tensor, conditioning: Conditioning, step: int) -> Tensor:
        samples = []
        for part in self._parts():
            with self.accelerator.autocast():
                rollout = self.distiller.rollout(noise[part], _rows(conditioning, part), step, gradient=False)
            samples.append(rollout.x_s)
        return torch.cat(samples)

    def _fake_loss(self, x_s: Tensor, conditioning: Conditioning, t: Tensor, noise: Tensor, part: Rows) -> Tensor:
        return self.distiller.fake_loss(x_s[part], _rows(conditioning, part), t[part], noise[part])

    def _generator_loss(
        self,
        noise: Tensor,
        conditioning: Conditioning,
        negative: Conditioning,
        step: int,
        t: Tensor,
        renoise: Tensor,
        part: Rows,
    ) -> Tensor:
        own = _rows(conditioning, part)
        rollout = self.distiller.rollout(noise[part], own, step, gradient=True)
        loss = self.distiller.generator_loss(rollout, own, _rows(negative, part), t[part], renoise[part])
        self._distance += self.distiller.score_distance * (len(t[part]) / self.batch)
        return loss

    def _parts(self, t: Tensor | None = None) -> list[Rows]:
        """This process's samples in parts that are evaluated at once; t: of the samples, where the parts may go by it.

        With one network on the device at a time the samples of a part are compared on one network.
        """
        size = self.config.memory.micro_batch_size or self.batch
        if t is None or not self.config.memory.offload_idle_network:
            return [slice(i, min(i + size, self.batch)) for i in range(0, self.batch, size)]
        high = self.roles.routing.first_runs(t)
        sides = [side.nonzero().flatten() for side in (high, ~high)]
        return [rows for side in sides if len(side) for rows in side.split(size)]

    def _train(self, role: str, t: Tensor, loss_of: Callable[[Rows], Tensor]) -> tuple[float, float]:
        """One optimizer step on the mean of a loss, part by part; a NaN or Inf skips it. Returns loss, gradient norm.

        Averages over processes are equal on all of them, so all take or skip the step together.
        """
        parameters, optimizer = self.roles.parameters(role), self.optimizers[role]
        total = torch.zeros((), device=self.device)
        for part in self._parts(t):
            with self.accelerator.autocast():
                loss = loss_of(part) * (len(t[part]) / self.batch)
            # What gradient checkpointing recomputes must be this role, on a network that is there.
            of_two = self.config.memory.offload_idle_network and role == FAKE
            self.roles.activate(role, self.roles.routing.component_at(float(t[part][0])) if of_two else None)
            (loss * self.config.parallel.context_parallel).backward()  # a group adds up, and all processes are averaged
            total += loss.detach()
        if len(self.roles.components(role)) > 1:  # a network that had no sample here may have had one elsewhere
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        average_gradients(parameters, self.accelerator.num_processes)
        norm = float(gathered(torch.nn.utils.clip_grad_norm_(parameters, self.sections[role].max_grad_norm)))
        value = float(self.accelerator.reduce(total, "mean"))
        finite = math.isfinite(value) and math.isfinite(norm)
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value, norm if finite else math.nan

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The expert has its averaged weights inside."""
        if self.average is None:
            yield
            return
        parameters = self.roles.parameters(self.expert)
        self.average.store(parameters)
        self.average.copy_to(parameters)
        try:
            yield
        finally:
            self.average.restore(parameters)

    def finish(self) -> None:
        """The average becomes the expert, which is frozen from now on."""
        if self.average is not None:
            self.average.copy_to(self.roles.parameters(self.expert))
        self.average = None
        self.roles.set_trainable([])


def _rows(conditioning: Conditioning, part: Rows) -> dict[str, Tensor]:
    return {name: value[part] for name, value in conditioning.items()}

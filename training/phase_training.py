"""The training of one phase: its losses, its optimizers, the average of its expert."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from pdmd_core.distillation import PhasedDistiller
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import FAKE, Roles
from training.config import DistillConfig, RoleSection
from training.draws import Draws
from training.prompts import PromptBank


@dataclass(frozen=True)
class Batches:
    """What samples are made of."""

    bank: PromptBank
    examples: int
    """How many of the bank's are trained on: the first ones."""
    shape: tuple[int, ...]
    """Of a latent."""


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
        self.distiller = PhasedDistiller(plan, phase, roles, config.objective.build())
        self.sections: dict[str, RoleSection] = {self.expert: config.generator, FAKE: config.fake}
        roles.set_trainable(self.sections)
        self.optimizers = {
            role: make_optimizer(roles.parameters(role), section) for role, section in self.sections.items()
        }
        decay = config.ema_decay
        self.average = EMAModel(roles.parameters(self.expert), decay=decay) if decay else None

    @property
    def expert(self) -> str:
        """The expert that this phase trains."""
        return self.distiller.expert

    def update(self, draws: Draws, source: Batches, lr_factor: float) -> Update:
        """Fake updates, then one generator update. lr_factor: of both learning rates."""
        config, distiller = self.config, self.distiller
        for role, section in self.sections.items():
            for group in self.optimizers[role].param_groups:
                group["lr"] = section.lr * lr_factor
        fake_losses, fake_norms = [], []
        sigmas: dict[str, list[float]] = {"fake": [], "generator": []}
        for _ in range(config.fake_updates):
            indices, noise = self._draw(draws, source)
            conditioning = source.bank.conditioning(indices, self.device)
            step = distiller.draw_step(draws.shared)
            with self.accelerator.autocast():
                rollout = distiller.rollout(noise, conditioning, step, gradient=False)
            for _ in range(config.draws_per_rollout):
                t, renoise = self._draw_score(draws, source)
                with self.accelerator.autocast():
                    loss = distiller.fake_loss(rollout.x_s, conditioning, t, renoise)
                value, norm = self._step(FAKE, loss)
                fake_losses.append(value)
                fake_norms.append(norm)
                sigmas["fake"] += t.tolist()
        indices, noise = self._draw(draws, source)
        conditioning = source.bank.conditioning(indices, self.device)
        negative = source.bank.negative_conditioning(indices, self.device)
        step = distiller.draw_step(draws.shared)
        with self.accelerator.autocast():
            rollout = distiller.rollout(noise, conditioning, step, gradient=True)
            t, renoise = self._draw_score(draws, source)
            loss = distiller.generator_loss(rollout, conditioning, negative, t, renoise)
        generator_loss, norm = self._step(self.expert, loss)
        sigmas["generator"] += t.tolist()
        if self.average is not None and math.isfinite(norm):
            self.average.step(self.roles.parameters(self.expert))
        values = {
            "generator_loss": generator_loss,
            "fake_loss": sum(fake_losses) / len(fake_losses),
            "generator_grad_norm": norm,
            "fake_grad_norm": sum(fake_norms) / len(fake_norms),
        }
        return Update(values, all(map(math.isfinite, [norm, *fake_norms])), sigmas)

    def _draw(self, draws: Draws, source: Batches) -> tuple[Tensor, Tensor]:
        return draws.examples(source.examples), draws.noise(source.shape).to(self.device)

    def _draw_score(self, draws: Draws, source: Batches) -> tuple[Tensor, Tensor]:
        return draws.score_sigmas(self.distiller), draws.noise(source.shape).to(self.device)

    def _step(self, role: str, loss: Tensor) -> tuple[float, float]:
        """Backward, average over processes, clip, step; a NaN or Inf skips the step. Returns loss and gradient norm.

        What is averaged is equal on all processes, so all of them take or skip the step together.
        """
        parameters = self.roles.parameters(role)
        self.roles.activate(role)  # what gradient checkpointing recomputes must be this role
        loss.backward()
        if len(self.roles.components(role)) > 1:  # a network that had no sample here may have had one elsewhere
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.accelerator.num_processes > 1:
            for gradient in gradients:
                gradient.copy_(self.accelerator.reduce(gradient, "mean"))
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.sections[role].max_grad_norm)
        value = float(self.accelerator.reduce(loss.detach(), "mean"))
        finite = math.isfinite(value) and bool(torch.isfinite(norm))
        if finite:
            self.optimizers[role].step()
        self.optimizers[role].zero_grad(set_to_none=True)
        return value, float(norm) if finite else math.nan

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The expert has its averaged weights inside."""
        if self.average is None:
            yield
            return
        parameters = self.roles.parameters(self.expert)
        self.average.store(parameters)
        self.average.copy_to(parameters)
        yield
        self.average.restore(parameters)

    def finish(self) -> None:
        """The average becomes the expert, which is frozen from now on."""
        if self.average is not None:
            self.average.copy_to(self.roles.parameters(self.expert))
        self.average = None
        self.roles.set_trainable([])


def make_optimizer(parameters: list[torch.nn.Parameter], section: RoleSection) -> torch.optim.AdamW:
    """AdamW as the section says."""
    return torch.optim.AdamW(parameters, lr=section.lr, betas=section.betas, weight_decay=section.weight_decay)

"""The training of one phase: an update is fake steps, then one generator step, or one step without a fake.

Runs and studies train with this.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from pdmd_core.batch import PROMPT_MASK, Batch, Renoising, Rows, as_rows, rows_of, without_padding
from pdmd_core.distillation import PhasedDistiller
from pdmd_core.families import Conditioning, TeacherRouting
from pdmd_core.phases import PhasePlan
from pdmd_core.velocities import VelocityOfRole
from training.config.schema import DistillConfig
from training.config.sections import RoleSection
from training.distributed.sharding import average_gradients, gathered
from training.loop.batches import Batches
from training.loop.optimizers import make_optimizer, set_rate


class TrainableRoles(VelocityOfRole, Protocol):
    """What the training of a phase needs of ``pdmd_core.roles.Roles``."""

    routing: TeacherRouting

    def parameters(self, role: str) -> list[nn.Parameter]: ...

    def components(self, role: str) -> tuple[str, ...]: ...

    def set_trainable(self, roles: Iterable[str]) -> None: ...

    def activate(self, role: str, component: str | None = None) -> None: ...


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step was made of, over all processes.

    Attributes:
        loss: Mean of the loss.
        grad_norm: Norm of the gradient before clipping; NaN where the step was skipped, since loss or gradient was not
            finite.
    """

    loss: float
    grad_norm: float


@dataclass(frozen=True)
class Update:
    """What one update did.

    Attributes:
        generator: The generator's step.
        fake: The steps of the fake; none without matching.
        score_distance: Mean of ``|v_teacher - v_fake|`` over all processes; None without matching.
        sigmas: Sigmas of this process's samples at which scores were asked, by role that trained there: fake,
            generator; none with regression.
    """

    generator: StepResult
    fake: Sequence[StepResult]
    score_distance: float | None
    sigmas: dict[str, list[float]]

    @property
    def good(self) -> bool:
        """Whether every step was taken."""
        return all(math.isfinite(step.grad_norm) for step in (self.generator, *self.fake))

    @property
    def values(self) -> dict[str, float]:
        """Losses and gradient norms by the names under which they are logged."""
        found = {"generator_loss": self.generator.loss, "generator_grad_norm": self.generator.grad_norm}
        if self.score_distance is None:
            return found
        of_fake = {
            "fake_loss": sum(step.loss for step in self.fake) / len(self.fake),
            "fake_grad_norm": sum(step.grad_norm for step in self.fake) / len(self.fake),
        }
        return {**found, **of_fake, "score_distance": self.score_distance}


class PhaseTraining:
    """One phase of a plan in training. Starting it resets no fake and freezes every other role.

    The expert begins as it is, or as the expert of the phase before, where the objective says so.

    Args:
        config: The configuration of the run.
        plan: The phase plan.
        phase: Index of the phase.
        roles: The networks.
        accelerator: The device, its precision and the processes.

    Attributes:
        batch: Samples of this process, or of the group of processes that share them.
        distiller: The losses.
        optimizers: One for each role that trains.
        average: The exponential moving average of the expert's weights; None without one.
    """

    def __init__(
        self, config: DistillConfig, plan: PhasePlan, phase: int, roles: TrainableRoles, accelerator: Accelerator
    ) -> None:
        self.config, self.roles, self.accelerator = config, roles, accelerator
        self.device = accelerator.device
        self.batch = config.batch_size // config.groups(accelerator.num_processes)
        self.distiller = PhasedDistiller(plan, phase, roles, config.objective, config.memory.guidance_batched)
        self.sections: dict[str, RoleSection] = {
            self.expert: config.generator,
            **dict.fromkeys(self.distiller.fakes, config.fake),
        }
        roles.set_trainable(self.sections)
        self.optimizers = {
            role: make_optimizer(roles.parameters(role), section, self.device)
            for role, section in self.sections.items()
        }
        self.average: EMAModel | None = None
        if decay := config.ema_decay:
            lowest = 0.0 if config.ema_warm_up else decay
            self.average = EMAModel(roles.parameters(self.expert), decay=decay, min_decay=lowest)

    @property
    def expert(self) -> str:
        """The expert that this phase trains."""
        return self.distiller.expert

    def update(self, batches: Batches, lr_factor: float) -> Update:
        """Take the fake steps of an update, then its generator step; without matching its one step.

        Args:
            batches: Where examples, noise and sigmas come from.
            lr_factor: Factor of both learning rates.

        Returns:
            What was done.
        """
        for role, section in self.sections.items():
            set_rate(self.optimizers[role], section.lr * lr_factor)
        if self.distiller.regresses:
            generator = self.path_step(batches.draw(negative=True), batches.step(self.distiller))
            self._average(generator)
            return Update(generator, [], None, {})
        if self.distiller.denoises:
            batch = batches.draw(negative=True)
            renoising = batches.renoising(self.distiller, batch.noise)
            generator = self.denoising_step(batch, renoising)
            self._average(generator)
            return Update(generator, [], None, {"generator": renoising.t.tolist()})
        fake: list[StepResult] = []
        sigmas: dict[str, list[float]] = {"fake": [], "generator": []}
        for _ in range(self.config.fake_updates):
            batch = batches.draw()
            step = batches.step(self.distiller)
            x_s = self.rollout(batch, step)
            for _ in range(self.config.draws_per_rollout):
                renoising = batches.renoising(self.distiller, x_s)
                fake.append(self.fake_step(x_s, batch.conditioning, renoising, self.distiller.fake_of(step)))
                sigmas["fake"] += renoising.t.tolist()
        batch = batches.draw(negative=True)
        step = batches.step(self.distiller)
        renoisings = [batches.renoising(self.distiller, batch.noise) for _ in range(self.config.objective.score_draws)]
        generator, distance = self.generator_step(batch, step, renoisings)
        sigmas["generator"] += [t for renoising in renoisings for t in renoising.t.tolist()]
        self._average(generator)
        return Update(generator, fake, distance, sigmas)

    def _average(self, generator: StepResult) -> None:
        if self.average is not None and math.isfinite(generator.grad_norm):
            self.average.step(self.roles.parameters(self.expert))

    def rollout(self, batch: Batch, step: int) -> Tensor:
        """Make samples at the end of the phase, without gradient, as many at once as are evaluated at once."""
        samples = []
        for part in self._parts():
            rows = self._on_device(batch.rows(part))
            with self.accelerator.autocast():
                samples.append(self.distiller.fake_rollout(rows, step))
        return torch.cat(samples)

    def fake_step(self, x_s: Tensor, conditioning: Conditioning, renoising: Renoising, role: str) -> StepResult:
        """Take one optimizer step of a fake on samples of the generator."""
        total = torch.zeros((), device=self.device)
        for part in self._parts(renoising.t):
            own, rows = renoising.rows(part), self._on_device(Batch(x_s[part], rows_of(conditioning, part)))
            with self.accelerator.autocast(), self._kept():
                loss = self.distiller.fake_loss(rows.noise, rows.conditioning, own, role)
            total += self._backward(role, loss, own.t)
        return self._step(role, total)

    def generator_step(self, batch: Batch, step: int, renoisings: Sequence[Renoising]) -> tuple[StepResult, float]:
        """Take one optimizer step of the expert; returns also the distance of teacher and fake over all processes."""
        total, distance = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for part in self._parts(renoisings[0].t):
            rows, own = self._on_device(batch.rows(part)), [renoising.rows(part) for renoising in renoisings]
            with self.accelerator.autocast(), self._kept():
                rollout = self.distiller.expert_rollout(rows, step)
                found = self.distiller.generator_loss(rollout, rows, *own)
            total += self._backward(self.expert, found.loss, own[0].t)
            distance += found.score_distance * (len(rows) / self.batch)
        return self._step(self.expert, total), float(self.accelerator.reduce(distance, "mean"))

    def path_step(self, batch: Batch, step: int) -> StepResult:
        """Take one optimizer step of the expert by regression on the teacher's path."""
        total = torch.zeros((), device=self.device)
        sigma = self.distiller.plan.phases[self.distiller.phase].sigmas[step]
        for part in self._parts():
            rows = self._on_device(batch.rows(part))
            with self.accelerator.autocast(), self._kept():
                loss = self.distiller.path_loss(rows, step)
            total += self._backward(self.expert, loss, torch.full((len(rows),), sigma))
        return self._step(self.expert, total)

    def denoising_step(self, batch: Batch, renoising: Renoising) -> StepResult:
        """Take one optimizer step of the expert on what the guided teacher samples."""
        total = torch.zeros((), device=self.device)
        for part in self._parts():
            own, rows = renoising.rows(part), self._on_device(batch.rows(part))
            with self.accelerator.autocast(), self._kept():
                loss = self.distiller.denoising_loss(rows, own)
            total += self._backward(self.expert, loss, own.t)
        return self._step(self.expert, total)

    def _on_device(self, batch: Batch) -> Batch:
        """Bring the conditioning of samples to the device, prompts as long as the longest of them."""
        sides = [batch.conditioning, batch.negative]
        if not self.config.memory.guidance_batched:  # each side is evaluated alone
            found = [side for one in sides for side in without_padding(one)]
        else:
            found = without_padding(*sides)
        brought = (
            {name: v if name == PROMPT_MASK else v.to(self.device, non_blocking=True) for name, v in side.items()}
            for side in found
        )
        positive, negative = brought
        return Batch(batch.noise, positive, negative, batch.begun)

    def _kept(self) -> AbstractContextManager[Any]:
        """Where what the backward pass needs is kept until then."""
        if not self.config.memory.offload_activations:
            return nullcontext()
        return save_on_cpu(pin_memory=self.device.type == "cuda")

    def _parts(self, t: Tensor | None = None) -> list[Rows]:
        """Divide this process's samples into parts that are evaluated at once.

        t: their sigmas, where the samples of a part are compared. With two networks a part is compared on one of them.
        """
        size = self.config.memory.micro_batch_size or self.batch
        if t is None or self.roles.routing.boundary is None:
            return [slice(i, min(i + size, self.batch)) for i in range(0, self.batch, size)]
        high = self.roles.routing.first_runs(t)
        sides = [side.nonzero().flatten() for side in (high, ~high)]
        return [as_rows(indices) for side in sides if len(side) for indices in side.split(size)]

    def _backward(self, role: str, loss: Tensor, t: Tensor) -> Tensor:
        """Add the gradient of a part's mean loss to the role's; returns the part's share of the whole loss."""
        loss = loss * (len(t) / self.batch)
        # What gradient checkpointing recomputes must be this role, on a network that is there.
        of_two = len(self.roles.components(role)) > 1
        self.roles.activate(role, self.roles.routing.component_at(float(t[0])) if of_two else None)
        (loss * self.config.parallel.context_parallel).backward()  # a group adds up, and all processes are averaged
        return loss.detach()

    def _step(self, role: str, total: Tensor) -> StepResult:
        """Take an optimizer step with the gradients that are there; a NaN or Inf skips it.

        Of a role on two networks, one that was not asked has none, on any process, and stays as it is.

        Averages over processes are equal on all of them, and so all take or skip the step together.
        """
        parameters, optimizer = self.roles.parameters(role), self.optimizers[role]
        average_gradients(parameters, self.accelerator.num_processes)
        norm = float(gathered(torch.nn.utils.clip_grad_norm_(parameters, self.sections[role].max_grad_norm)))
        value = float(self.accelerator.reduce(total, "mean"))
        finite = math.isfinite(value) and math.isfinite(norm)
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return StepResult(value, norm if finite else math.nan)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the expert its averaged weights inside a ``with`` block."""
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
        """Make the average the expert, which is frozen from now on."""
        if self.average is not None:
            self.average.copy_to(self.roles.parameters(self.expert))
        self.average = None
        self.roles.set_trainable([])

"""Every method on every teacher, trained by the updates that ``training/distill.py`` makes too."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.claims.common.methods import Run
from pdmd_core.batch import Batch, Renoising
from pdmd_core.distillation import PhasedDistiller
from pdmd_core.method import Objective
from pdmd_core.phases import PhasePlan
from training.config.schema import DistillConfig, parse_config
from training.loop.batches import Batches
from training.loop.optimizers import lr_factor
from training.loop.phase import PhaseTraining, TrainableRoles


@dataclass(frozen=True)
class Recipe:
    """What all methods share.

    Attributes:
        batch_size: Samples of an update.
        fake_updates: Rollouts that the fake learns from, for each generator update.
        draws_per_rollout: Gradient steps of the fake on one of them, each with noise of its own.
        fake_lr_factor: Learning rate of the fake, as a multiple of the generator's.
        ema_decay: Decay of the average of the expert's weights.
        ema_warm_up: Whether the average is over few updates at first.
        lr_decay_share: The last share of the updates of a phase over which learning rates fall to 0.
        max_grad_norm: Norm to which gradients are clipped.
    """

    batch_size: int
    fake_updates: int
    draws_per_rollout: int
    fake_lr_factor: float
    ema_decay: float
    ema_warm_up: bool
    lr_decay_share: float
    max_grad_norm: float

    def config(self, run: Run, plan: PhasePlan, objective: Objective) -> DistillConfig:
        """Write a run as the configuration that the updates take."""
        settings = {
            "model": {"path": "study"},
            "data": {"prompts": "study"},
            "plan": {
                "sigmas": [list(phase.sigmas) for phase in plan.phases],
                "names": [phase.name for phase in plan.phases],
            },
            "objective": asdict(objective),
            "generator": {"lr": run.lr, "max_grad_norm": self.max_grad_norm},
            "fake": {"lr": self.fake_lr_factor * run.lr, "max_grad_norm": self.max_grad_norm},
            "updates": run.updates // len(plan),
            "batch_size": self.batch_size,
            "fake_updates": self.fake_updates,
            "draws_per_rollout": self.draws_per_rollout,
            "lr_decay_share": self.lr_decay_share,
            "ema_decay": self.ema_decay,
            "ema_warm_up": self.ema_warm_up,
            "seed": run.seed,
        }
        return parse_config(settings, run.name)


class Problem(Protocol):
    """A teacher with the untrained networks of one run on it."""

    plan: PhasePlan
    objective: Objective
    evaluations: Counter[str]
    """Network evaluations of the whole training by role: a batch is one, with guidance two."""

    def networks(self, phase: int) -> TrainableRoles:
        """Make the roles of a phase that is about to be trained: its FAKE is a new one of its own."""
        ...

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Draw what rollouts start from."""
        ...

    def experts(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Name of each expert to its weights."""
        ...


class StudyBatches:
    """Batches of a problem; one generator draws everything, in the order in which it is asked for."""

    def __init__(self, problem: Problem, count: int, generator: torch.Generator) -> None:
        self.problem, self.count, self.generator = problem, count, generator

    def draw(self, negative: bool = False) -> Batch:
        """Draw what rollouts start from."""
        return self.problem.draw(self.count, self.generator)

    def step(self, distiller: PhasedDistiller) -> int:
        """Draw the step that trains."""
        return distiller.draw_step(self.generator)

    def renoising(self, distiller: PhasedDistiller, like: Tensor) -> Renoising:
        """Draw where scores are compared."""
        t = distiller.draw_score_sigma(self.count, self.generator)
        return Renoising(t, torch.randn(like.shape, generator=self.generator))


@dataclass(frozen=True)
class Distilled:
    """What a run leaves.

    Attributes:
        experts: Name of each expert to its weights.
        evaluations: Network evaluations of the whole training by role: a batch is one, with guidance two.
        skipped: Optimizer steps that were not taken, because loss or gradient was NaN or Inf.
    """

    experts: dict[str, dict[str, Tensor]]
    evaluations: dict[str, int]
    skipped: int


def distil(problem: Problem, run: Run, recipe: Recipe, progress: Callable[[], object] = lambda: None) -> Distilled:
    """Train all experts of a run. Equal runs give equal experts.

    Args:
        problem: The teacher and the untrained networks.
        run: Method, learning rate, seed and updates.
        recipe: What all methods share.
        progress: Called after each update.

    Returns:
        The experts, and what their training took.
    """
    config = recipe.config(run, problem.plan, problem.objective)
    batches = StudyBatches(problem, recipe.batch_size, torch.Generator().manual_seed(run.seed))
    return distil_with(problem, run.method.joint, config, batches, PhaseTraining, progress)


def distil_with(
    problem: Problem,
    joint: bool,
    config: DistillConfig,
    batches: Batches,
    make_training: Callable[[DistillConfig, PhasePlan, int, TrainableRoles, Accelerator], PhaseTraining],
    progress: Callable[[], object] = lambda: None,
) -> Distilled:
    """Train all experts of a configuration.

    Every phase gets the same number of updates. One phase is trained after the other; a joint
    method takes one update of each in turn.

    Args:
        problem: The teacher and the untrained networks.
        joint: Whether phases are trained in turn.
        config: What the updates take.
        batches: Where they get everything that is random.
        make_training: Makes the training of a phase.
        progress: Called after each update.

    Returns:
        The experts, and what their training took.
    """
    phases, accelerator, skipped = range(len(problem.plan)), Accelerator(cpu=True), 0
    for together in [list(phases)] if joint else [[phase] for phase in phases]:
        trainings = [
            make_training(config, problem.plan, phase, problem.networks(phase), accelerator) for phase in together
        ]
        updates = config.updates_of(together[0])
        for done in range(updates):
            for training in trainings:
                update = training.update(batches, lr_factor(done, updates, config.lr_decay_share))
                skipped += sum(not math.isfinite(step.grad_norm) for step in (update.generator, *update.fake))
                progress()
        for training in trainings:
            training.finish()
    experts = {name: dict(weights) for name, weights in problem.experts().items()}
    return Distilled(experts, dict(problem.evaluations), skipped)

"""Distilling the mixture with the library's own distiller: the loop that ``PhasedDistiller`` leaves to its caller."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.claims.methods import Method, Run
from benchmarks.claims.mixture import GaussianMixture, VelocityNetwork
from pdmd_core.distillation import Objective, PhasedDistiller
from pdmd_core.families.base import Conditioning, classifier_free_guidance
from pdmd_core.flow import Sigma
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import FAKE, TEACHER

NOTHING: Conditioning = {}
"""The mixture has no prompts."""


@dataclass(frozen=True)
class Settings:
    """What all methods share."""

    shift: float = 1.0
    """Of the plans; [1, .75, .5, .25] for four steps."""
    batch_size: int = 256
    fake_updates: int = 5
    fake_lr_factor: float = 2.0
    """Learning rate of the fake, as a multiple of the generator's."""
    ema_decay: float = 0.98
    lr_decay_share: float = 0.7
    """The last share of the updates of a phase over which learning rates fall to 0."""
    max_grad_norm: float = 1.0
    width: int = 128
    initial_updates: int = 3000
    """Regression steps of the network that all roles start from, towards the exact velocity."""

    def plan(self, method: Method) -> PhasePlan:
        """The phase plan of a method."""
        return PhasePlan.from_steps(method.steps, self.shift)

    def objective(self, method: Method) -> Objective:
        """Its objective; the mixture needs no guidance."""
        return replace(Objective(guidance_scale=1.0), **method.objective)

    def as_dict(self) -> dict[str, Any]:
        """For metadata and reports."""
        return asdict(self)


class MixtureNetworks:
    """What ``PhasedDistiller`` asks of ``Roles``: the exact teacher, experts, one fake. Counts evaluations by role."""

    def __init__(self, mixture: GaussianMixture, experts: Mapping[str, nn.Module], fake: nn.Module) -> None:
        self.mixture = mixture
        self.networks = {**experts, FAKE: fake}
        self.evaluations: Counter[str] = Counter()

    def velocity(self, role: str, x: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        self.evaluations[role] += 1
        return self.mixture.velocity(x, sigma) if role == TEACHER else self.networks[role](x, sigma)

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        return classifier_free_guidance(positive, negative, scale)


def fit_initial_network(mixture: GaussianMixture, settings: Settings) -> VelocityNetwork:
    """The network that every expert and fake starts from: a regression of the exact velocity."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = VelocityNetwork(settings.width)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.initial_updates)
    for _ in range(settings.initial_updates):
        sigma = torch.rand(512, 1, generator=generator).clamp(min=1e-3)
        x = (1 - sigma) * mixture.sample(512, generator) + sigma * torch.randn(512, 2, generator=generator)
        loss = (network(x, sigma[:, 0]) - mixture.velocity(x, sigma[:, 0])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.requires_grad_(False)


@dataclass(frozen=True)
class Distilled:
    """What a run leaves."""

    experts: dict[str, VelocityNetwork]
    evaluations: dict[str, int]
    """Network evaluations of the whole training by role, a batch counted as one."""
    skipped: int
    """Updates with NaN or Inf in the gradient, which were not made."""


class PhaseTraining:
    """Optimizers, average and updates of one phase."""

    def __init__(
        self,
        run: Run,
        phase: int,
        mixture: GaussianMixture,
        experts: Mapping[str, nn.Module],
        initial: nn.Module,
        settings: Settings,
        generator: torch.Generator,
    ) -> None:
        self.settings, self.generator = settings, generator
        self.networks = MixtureNetworks(mixture, experts, copy.deepcopy(initial).requires_grad_(True))
        plan = settings.plan(run.method)
        self.distiller = PhasedDistiller(plan, phase, self.networks, settings.objective(run.method))
        self.updates = run.updates // len(plan)
        self.expert = experts[self.distiller.expert].requires_grad_(True)
        self.average = AveragedModel(self.expert, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
        self.optimizers = [
            torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.0, 0.999), weight_decay=0.01)
            for network, lr in ((self.expert, run.lr), (self.networks.networks[FAKE], settings.fake_lr_factor * run.lr))
        ]
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, self._lr_factor) for o in self.optimizers]
        self.skipped = 0

    def _lr_factor(self, update: int) -> float:
        return min(1.0, (self.updates - update) / (self.settings.lr_decay_share * self.updates))

    def update(self) -> None:
        """Fake updates, then one of the expert."""
        distiller, settings = self.distiller, self.settings
        expert, fake = self.optimizers
        for _ in range(settings.fake_updates):
            rollout = distiller.rollout(self._noise(), NOTHING, distiller.draw_step(self.generator), gradient=False)
            t = distiller.draw_score_sigma(settings.batch_size, self.generator)
            self._step(fake, distiller.fake_loss(rollout.x_s, NOTHING, t, self._noise()))
        rollout = distiller.rollout(self._noise(), NOTHING, distiller.draw_step(self.generator), gradient=True)
        t = distiller.draw_score_sigma(settings.batch_size, self.generator)
        self._step(expert, distiller.generator_loss(rollout, NOTHING, NOTHING, t, self._noise()))
        self.average.update_parameters(self.expert)
        for schedule in self.schedules:
            schedule.step()

    def _noise(self) -> Tensor:
        return torch.randn(self.settings.batch_size, 2, generator=self.generator)

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        parameters = optimizer.param_groups[0]["params"]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm)
        if math.isfinite(float(norm)):
            optimizer.step()
        else:
            self.skipped += 1

    def finish(self) -> None:
        """The average becomes the expert, which is frozen from now on."""
        self.expert.load_state_dict(self.average.module.state_dict())
        self.expert.requires_grad_(False)


def distil(run: Run, mixture: GaussianMixture, initial: VelocityNetwork, settings: Settings) -> Distilled:
    """Train all experts of a run. Equal runs give equal experts.

    Every phase gets the same number of updates, ``run.updates`` in all. One phase after the other; a joint method takes
    one update of each in turn, with a fake of its own for each phase.
    """
    generator = torch.Generator().manual_seed(run.seed)
    plan = settings.plan(run.method)
    experts = {phase.name: copy.deepcopy(initial) for phase in plan.phases}

    def start(phase: int) -> PhaseTraining:
        return PhaseTraining(run, phase, mixture, experts, initial, settings, generator)

    def groups() -> Iterator[list[PhaseTraining]]:
        if run.method.joint:
            yield [start(phase) for phase in range(len(plan))]
        else:
            for phase in range(len(plan)):
                yield [start(phase)]

    evaluations: Counter[str] = Counter()
    skipped = 0
    for together in groups():
        for _ in range(together[0].updates):
            for training in together:
                training.update()
        for training in together:
            training.finish()
            evaluations += training.networks.evaluations
            skipped += training.skipped
    return Distilled(experts, dict(evaluations), skipped)

"""Distilling the mixture: its settings, its networks, the network that all of them start from."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims.common.distilling import Recipe
from benchmarks.claims.common.methods import Method
from benchmarks.claims.mixture.mixture import GaussianMixture, VelocityNetwork
from pdmd_core.batch import Batch
from pdmd_core.families import Conditioning, TeacherRouting
from pdmd_core.families.guidance import classifier_free_guidance
from pdmd_core.flow import Sigma
from pdmd_core.method import Objective, fake_roles
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import TEACHER

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
        return PhasePlan.from_steps(method.steps, method.shift or self.shift)

    def objective(self, method: Method) -> Objective:
        """Its objective; the mixture needs no guidance."""
        return replace(Objective(guidance_scale=1.0), **method.objective)

    def recipe(self) -> Recipe:
        """What the training loop is told."""
        return Recipe(
            batch_size=self.batch_size,
            fake_updates=self.fake_updates,
            draws_per_rollout=1,
            fake_lr_factor=self.fake_lr_factor,
            ema_decay=self.ema_decay,
            ema_warm_up=False,
            lr_decay_share=self.lr_decay_share,
            max_grad_norm=self.max_grad_norm,
        )

    def as_dict(self) -> dict[str, Any]:
        """For metadata and reports."""
        return asdict(self)


class MixtureNetworks:
    """The exact teacher, the experts and one fake, as the training of a phase asks for them.

    Args:
        mixture: The teacher.
        experts: Name to network.
        fakes: The fake score networks of a phase, by role.
        evaluations: Counts evaluations by role.
    """

    routing = TeacherRouting()

    def __init__(
        self,
        mixture: GaussianMixture,
        experts: Mapping[str, nn.Module],
        fakes: Mapping[str, nn.Module],
        evaluations: Counter[str] | None = None,
    ) -> None:
        self.mixture = mixture
        self.networks = {**experts, **fakes}
        self.evaluations = Counter() if evaluations is None else evaluations
        self._trained: list[str] = []

    def velocity(self, role: str, x: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        """Ask a role."""
        self.evaluations[role] += 1
        return self.mixture.velocity(x, sigma) if role == TEACHER else self.networks[role](x, sigma)

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance, which the mixture has no use for."""
        return classifier_free_guidance(positive, negative, scale)

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The weights of an expert or of a fake."""
        return list(self.networks[role].parameters())

    def components(self, role: str) -> tuple[str, ...]:
        """The teacher is one network."""
        return self.routing.components

    def set_trainable(self, roles: Iterable[str]) -> None:
        """Train these of the phase's roles, and freeze those that were trained; other phases are theirs."""
        chosen = list(roles)
        for role in [*self._trained, *chosen]:
            self.networks[role].requires_grad_(role in chosen)
        self._trained = chosen

    def activate(self, role: str, component: str | None = None) -> None:
        """Every role has a network of its own."""


class MixtureProblem:
    """The networks of one run, all copies of the same."""

    def __init__(self, method: Method, mixture: GaussianMixture, initial: nn.Module, settings: Settings) -> None:
        self.plan, self.objective = settings.plan(method), settings.objective(method)
        self.mixture, self.initial = mixture, initial
        self.own: dict[str, nn.Module] = {phase.name: copy.deepcopy(initial) for phase in self.plan.phases}
        self.evaluations: Counter[str] = Counter()

    def networks(self, phase: int) -> MixtureNetworks:
        """The networks with new fakes."""
        fakes = {role: copy.deepcopy(self.initial) for role in fake_roles(self.plan, self.objective)}
        return MixtureNetworks(self.mixture, self.own, fakes, self.evaluations)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Noise alone."""
        return Batch(torch.randn(count, self.mixture.dimensions, generator=generator), NOTHING, NOTHING)

    def experts(self) -> dict[str, dict[str, Tensor]]:
        """The weights of each expert."""
        return {name: network.state_dict() for name, network in self.own.items()}


def fit_initial_network(mixture: GaussianMixture, settings: Settings) -> VelocityNetwork:
    """The network that every expert and fake starts from: a regression of the exact velocity."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = VelocityNetwork(settings.width, mixture.dimensions)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.initial_updates)
    for _ in range(settings.initial_updates):
        sigma = torch.rand(512, 1, generator=generator).clamp(min=1e-3)
        x = (1 - sigma) * mixture.sample(512, generator) + sigma * torch.randn(
            512, mixture.dimensions, generator=generator
        )
        loss = (network(x, sigma[:, 0]) - mixture.velocity(x, sigma[:, 0])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.requires_grad_(False)

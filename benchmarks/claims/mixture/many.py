"""Many runs of one method at once: their networks are stacked, so that the plane's small networks fill a processor.

The updates are those of ``PhaseTraining``. Only what would mix the runs is done run by run: clipping a gradient,
skipping a step that is not finite, and the learning rate.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.claims.common.distilling import Distilled, distil_with
from benchmarks.claims.common.methods import Run
from benchmarks.claims.mixture.mixture import GaussianMixture, VelocityNetwork
from benchmarks.claims.mixture.training import NOTHING, MixtureProblem, Settings
from pdmd_core.batch import Batch, Renoising
from pdmd_core.distillation import PhasedDistiller
from pdmd_core.flow import Sigma, like
from pdmd_core.phases import PhasePlan
from training.config.schema import DistillConfig
from training.loop.phase import PhaseTraining, StepResult, TrainableRoles


class StackedNetworks(nn.Module):
    """Copies of a network that are evaluated together: rows of the batch belong to them in equal parts, in order."""

    def __init__(self, network: VelocityNetwork, count: int) -> None:
        super().__init__()
        self.count = count
        self.own = nn.ParameterList(
            nn.Parameter(p.detach().expand(count, *p.shape).clone()) for p in network.parameters()
        )
        self.names = [name for name, _ in network.named_parameters()]

    def forward(self, x: Tensor, sigma: Sigma) -> Tensor:
        column = like(sigma, x).expand(len(x), 1)
        angles = math.pi * column * torch.tensor(VelocityNetwork.FREQUENCIES)
        h = torch.cat([x, column, angles.sin(), angles.cos()], dim=1).unflatten(0, (self.count, -1))
        weights = list(self.own)
        for weight, bias in zip(weights[::2], weights[1::2], strict=True):
            out = torch.baddbmm(bias[:, None], h, weight.mT)
            h = F.silu(out) if weight is not weights[-2] else out
        return h.flatten(0, 1)

    def states(self) -> list[dict[str, Tensor]]:
        """The weights of each, as a ``VelocityNetwork`` names them."""
        return [
            {name: p.detach()[i].clone() for name, p in zip(self.names, self.own, strict=True)}
            for i in range(self.count)
        ]


class StackedProblem(MixtureProblem):
    """The networks of all runs."""

    def __init__(
        self, runs: Sequence[Run], mixture: GaussianMixture, initial: VelocityNetwork, settings: Settings
    ) -> None:
        stacked = StackedNetworks(initial, len(runs))
        super().__init__(runs[0].method, mixture, stacked, settings)
        self.stacks = {phase.name: copy.deepcopy(stacked) for phase in self.plan.phases}
        self.own = dict(self.stacks)


class StackedBatches:
    """Each seed has a generator, of which its run at every learning rate gets the same draws; steps are those of the
    first seed.
    """

    def __init__(self, runs: Sequence[Run], count: int, dimensions: int) -> None:
        self.seeds, self.count, self.dimensions = [run.seed for run in runs], count, dimensions
        self.generators = {seed: torch.Generator().manual_seed(seed) for seed in self.seeds}

    def draw(self, negative: bool = False) -> Batch:
        """Noise alone."""
        return Batch(self._noise(), NOTHING, NOTHING)

    def step(self, distiller: PhasedDistiller) -> int:
        """Draw the step that trains."""
        first, *_ = [distiller.draw_step(generator) for generator in self.generators.values()]  # all of them draw
        return first

    def renoising(self, distiller: PhasedDistiller, like: Tensor) -> Renoising:
        """Draw where scores are compared."""
        t = {seed: distiller.draw_score_sigma(self.count, own) for seed, own in self.generators.items()}
        return Renoising(torch.cat([t[seed] for seed in self.seeds]), self._noise())

    def _noise(self) -> Tensor:
        shape = (self.count, self.dimensions)
        drawn = {seed: torch.randn(shape, generator=own) for seed, own in self.generators.items()}
        return torch.cat([drawn[seed] for seed in self.seeds])


class StackedTraining(PhaseTraining):
    """One phase of all runs in training."""

    def __init__(
        self, rates: Tensor, config: DistillConfig, plan: PhasePlan, phase: int, roles: TrainableRoles, on: Accelerator
    ) -> None:
        super().__init__(config, plan, phase, roles, on)
        self.rates = rates

    def _backward(self, role: str, loss: Tensor, t: Tensor) -> Tensor:
        """The loss is the mean over all runs; each gets the gradient of its own."""
        return super()._backward(role, loss * len(self.rates), t)

    def _step(self, role: str, total: Tensor) -> StepResult:
        """Clip and step run by run. AdamW's step is proportional to its learning rate, which is 1 in the optimizer."""
        parameters, optimizer = self.roles.parameters(role), self.optimizers[role]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        good = norms.isfinite()
        scale = torch.where(good, (self.sections[role].max_grad_norm / (norms + 1e-6)).clamp(max=1), 0.0)
        for gradient in gradients:
            gradient.nan_to_num_(0.0, 0.0, 0.0).mul_(_along(scale, gradient))
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        rates = torch.where(good, self.rates, 0.0)
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old + _along(rates, p) * (p - old))
        optimizer.zero_grad(set_to_none=True)
        return StepResult(float(total), float(norms[good].median()) if bool(good.any()) else math.nan)


def _along(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *([1] * (like.ndim - 1)))


def distil_many(
    runs: Sequence[Run], mixture: GaussianMixture, initial: VelocityNetwork, settings: Settings
) -> list[Distilled]:
    """Train runs of one method for the same number of updates, at their learning rates and seeds.

    Args:
        runs: They differ in learning rate and seed alone.
        mixture: The teacher.
        initial: The network that all roles start from.
        settings: What all methods share.

    Returns:
        What each leaves. Evaluations are those of one run.
    """
    first = runs[0]
    if any(replace(run, lr=first.lr, seed=first.seed) != first for run in runs):
        raise ValueError("runs that are trained at once differ in learning rate and seed alone")
    problem = StackedProblem(runs, mixture, initial, settings)
    recipe = replace(settings.recipe(), batch_size=settings.batch_size * len(runs))
    config = recipe.config(replace(first, lr=1.0), problem.plan, problem.objective)
    rates = torch.tensor([run.lr for run in runs])

    def make(*given: object) -> StackedTraining:
        return StackedTraining(rates, *given)  # type: ignore[arg-type]

    batches = StackedBatches(runs, settings.batch_size, mixture.dimensions)
    done = distil_with(problem, first.method.joint, config, batches, make)
    states = {name: network.states() for name, network in problem.stacks.items()}
    evaluations = dict(Counter(done.evaluations))
    return [
        Distilled({name: own[i] for name, own in states.items()}, evaluations, done.skipped) for i in range(len(runs))
    ]

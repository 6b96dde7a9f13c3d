"""The comparison on the mixture: every run trained once, measured once, both kept in files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.claims.common.distilling import distil
from benchmarks.claims.common.evidence import Row
from benchmarks.claims.common.files import identity_of, read_row, write_row, write_tensors, write_text
from benchmarks.claims.common.methods import Run
from benchmarks.claims.mixture.mixture import (
    GaussianMixture,
    VelocityNetwork,
    kernel_distance_to_exact,
    mode_weight_error,
    share_off_modes,
    variance_in_modes,
)
from benchmarks.claims.mixture.training import NOTHING, MixtureNetworks, MixtureProblem, Settings, fit_initial_network
from pdmd_core.flow import euler_step
from pdmd_core.metrics import frechet_distance, manifold, pairwise_distance
from pdmd_core.noise_level import shift_sigma
from pdmd_core.phases import PhasePlan
from pdmd_core.rollout import Velocity, route, sample, simulate
from pdmd_core.velocities import expert_velocities

REFERENCES = {
    "exact": "exact samples (noise floor)",
    "teacher_50": "teacher, 50 steps",
    "teacher_4": "teacher, 4 steps",
}
"""What needs no training: key to title."""
_NOISE_SEED, _EXACT_SEED = 1000, 2000
_FEW = 2000
"""Samples whose pairs are all looked at in features: diversity, recall and coverage."""


@dataclass(frozen=True)
class Path2D:
    """Samples, and those on the way at the end of the first phase with the sigma of that place (None: one phase)."""

    samples: Tensor
    at_boundary: Tensor | None
    boundary: float | None


@dataclass(frozen=True)
class PhaseEnd:
    """Samples at the end of a phase, which should be those of the mixture noised to ``sigma``."""

    sigma: float
    chained: Tensor
    """From noise, through this phase and all before it."""
    alone: Tensor
    """Through this phase alone, from exact samples at its start."""


class MixtureStudy:
    """Files of one choice of settings, in a folder named after them: other settings never meet these results."""

    teacher = "mixture"
    references = REFERENCES
    lrs = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """The grid of learning rates."""
    grid_seeds: int | None = None
    """It is run with all seeds."""
    updates = 1200
    """Generator updates over all phases."""
    longer = (2, 4, 8)
    """Times the updates, in the stage "long"."""

    def __init__(self, work_dir: Path, settings: Settings | None = None, samples: int = 10_000) -> None:
        self.settings, self.samples = settings or Settings(), samples
        self.mixture = GaussianMixture.ring()
        self.folder = work_dir / f"{self.teacher}-{identity_of(self.describe())}"
        write_text(self.folder / "settings.json", json.dumps(self.describe(), indent=1) + "\n")

    def describe(self) -> dict[str, object]:
        """Settings for the report."""
        return {**self.settings.as_dict(), "samples": self.samples}

    def prepare(self) -> None:
        """What all runs start from."""
        _ = self.initial

    # --- networks ------------------------------------------------------------

    @cached_property
    def initial(self) -> VelocityNetwork:
        """The network that all roles start from."""
        path = self.folder / "initial.safetensors"
        if not path.exists():
            write_tensors(path, fit_initial_network(self.mixture, self.settings).state_dict(), {})
        network = VelocityNetwork(self.settings.width)
        network.load_state_dict(load_file(path))
        return network.requires_grad_(False)

    def train(self, run: Run) -> Path:
        """The weights of a run's experts; trained unless they are there."""
        path = self.folder / "experts" / f"{run.name}.safetensors"
        if not path.exists():
            problem = MixtureProblem(run.method, self.mixture, self.initial, self.settings)
            done = distil(problem, run, self.settings.recipe())
            weights = {f"{name}/{key}": value for name, own in done.experts.items() for key, value in own.items()}
            write_tensors(
                path, weights, {"evaluations": json.dumps(done.evaluations), "skipped": json.dumps(done.skipped)}
            )
        return path

    def walk(self, run: Run, seed: int, count: int | None = None) -> Path2D:
        """Samples of a run's experts from the noise of this seed, as its plan says."""
        plan, velocities = self._experts(run)
        noise = _noise(seed, count or self.samples)
        with torch.no_grad():
            samples = sample(route(velocities, plan), plan.sigmas, noise)
            if len(plan) == 1:
                return Path2D(samples, None, None)
            half = simulate(velocities, plan, 0, len(plan.phases[0].sigmas) - 1, noise, gradient=False)
        return Path2D(samples, half.x_s, half.sigma_end)

    def truncated(self, run: Run, seed: int, count: int | None = None) -> list[Tensor]:
        """Samples of rollouts that jump to the end from each step of the last phase; the last ones are whole rollouts.

        All from the same noise, the same as that of ``walk``.
        """
        plan, velocities = self._experts(run)
        noise, last = _noise(seed, count or self.samples), len(plan) - 1
        steps = range(len(plan.phases[last].sigmas))
        with torch.no_grad():
            return [simulate(velocities, plan, last, step, noise, gradient=False).x_s for step in steps]

    def phase_ends(self, run: Run, seed: int, count: int | None = None) -> list[PhaseEnd]:
        """Samples at the end of each phase of a run, of all experts so far and of the phase's own expert alone."""
        plan, velocities = self._experts(run)
        noise, ends = _noise(seed, count or self.samples), []
        generator = torch.Generator().manual_seed(_EXACT_SEED + 1 + seed)
        for i, (phase, velocity) in enumerate(zip(plan.phases, velocities, strict=True)):
            end, start = plan.interval(i)
            x = self.mixture.marginal(start).sample(len(noise), generator)
            with torch.no_grad():
                chained = simulate(velocities, plan, i, len(phase.sigmas) - 1, noise, gradient=False).x_s
                for sigma, after in pairwise([*phase.sigmas, end]):
                    x = euler_step(x, velocity(x, sigma), sigma, after)
            ends.append(PhaseEnd(end, chained, x))
        return ends

    def _experts(self, run: Run) -> tuple[PhasePlan, list[Velocity]]:
        """The plan and the velocity of each expert of a run."""
        weights = load_file(self.train(run))
        plan = self.settings.plan(run.method)
        experts = {}
        for phase in plan.phases:
            experts[phase.name] = VelocityNetwork(self.settings.width)
            prefix = f"{phase.name}/"
            experts[phase.name].load_state_dict(
                {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            )
        networks = MixtureNetworks(self.mixture, experts, {})
        return plan, expert_velocities(networks, plan, NOTHING)

    def reference(self, name: str, seed: int, count: int | None = None) -> Tensor:
        """Samples of what needs no training: exact ones, or the exact velocity in Euler steps."""
        count = count or self.samples
        if name == "exact":
            return self.mixture.sample(count, torch.Generator().manual_seed(_EXACT_SEED + 1 + seed))
        steps = int(name.removeprefix("teacher_"))
        sigmas = [shift_sigma(1 - i / steps, self.settings.shift) for i in range(steps)]
        velocity: Velocity = self.mixture.velocity
        return sample(velocity, sigmas, _noise(seed, count))

    # --- rows ------------------------------------------------------------

    def has_row(self, run: Run) -> bool:
        """Whether a run was trained and measured."""
        return self._row_path(run).exists()

    def _row_path(self, run: Run) -> Path:
        return self.folder / "rows" / f"{run.name}.json"

    def row(self, run: Run) -> Row:
        """Train and measure a run, or read what is there."""
        path = self._row_path(run)
        if not path.exists():
            with safe_open(self.train(run), "pt") as file:
                metadata = file.metadata()
            evaluations: dict[str, int] = json.loads(metadata["evaluations"])
            found = self.walk(run, run.seed)
            at_boundary = None
            if found.at_boundary is not None and found.boundary is not None:
                at_boundary = kernel_distance_to_exact(found.at_boundary, self.mixture.marginal(found.boundary))
            row = self._measured(
                run.method.key, run.seed, sum(run.method.steps), found.samples, run.lr, run.updates, at_boundary
            )
            row.extra["training_evaluations"] = sum(evaluations.values())
            row.extra["skipped_updates"] = json.loads(metadata["skipped"])
            write_row(path, row)
        return read_row(path)

    def reference_row(self, name: str, seed: int) -> Row:
        """Measure what needs no training, or read what is there."""
        path = self.folder / "rows" / f"{name}-seed-{seed}.json"
        if not path.exists():
            evaluations = 0 if name == "exact" else int(name.removeprefix("teacher_"))
            write_row(path, self._measured(name, seed, evaluations, self.reference(name, seed), None, 0, None))
        return read_row(path)

    def _measured(
        self,
        method: str,
        seed: int,
        evaluations: int,
        samples: Tensor,
        lr: float | None,
        updates: int,
        at_boundary: float | None,
    ) -> Row:
        finite = samples if bool(samples.isfinite().all()) else samples.nan_to_num(0.0, 100.0, -100.0)
        exact = self.mixture.sample(self.samples, torch.Generator().manual_seed(_EXACT_SEED))
        few = min(_FEW, len(finite))
        reached = manifold(finite[:few], exact[:few])
        one_prompt = torch.zeros(few, dtype=torch.long)
        return Row(
            teacher=self.teacher,
            method=method,
            seed=seed,
            network_evaluations=evaluations,
            frechet=frechet_distance(finite, exact),
            diversity=pairwise_distance(finite[:few], one_prompt),
            motion=None,
            lr=lr,
            updates=updates,
            score=kernel_distance_to_exact(finite, self.mixture),
            extra={
                "mode_weight_error": mode_weight_error(finite, self.mixture),
                "off_modes": share_off_modes(finite, self.mixture),
                "variance_in_modes": variance_in_modes(finite, self.mixture),
                "recall": reached.recall.value,
                "coverage": reached.coverage.value,
                "boundary_kernel_distance": at_boundary,
            },
        )


def _noise(seed: int, count: int) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(_NOISE_SEED + seed))

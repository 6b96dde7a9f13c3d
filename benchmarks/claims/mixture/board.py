"""Variants on the mixtures at equal network evaluations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.claims.common.board import REFINED, Board
from benchmarks.claims.common.distilling import Distilled
from benchmarks.claims.common.evidence import Row
from benchmarks.claims.common.files import identity_of, read_row, write_row, write_tensors, write_text
from benchmarks.claims.common.methods import Method, Run
from benchmarks.claims.common.variants import cost_of_updates
from benchmarks.claims.mixture.kinds import KINDS
from benchmarks.claims.mixture.many import distil_many
from benchmarks.claims.mixture.mixture import (
    VelocityNetwork,
    kernel_distance_to_exact,
    mode_weight_error,
    share_off_modes,
    variance_in_modes,
)
from benchmarks.claims.mixture.training import NOTHING, MixtureNetworks, Settings, fit_initial_network
from pdmd_core.metrics import frechet_distance, pairwise_distance
from pdmd_core.noise_level import shift_sigma
from pdmd_core.phases import PhasePlan
from pdmd_core.rollout import route, sample
from pdmd_core.velocities import expert_velocities

_NOISE_SEED, _EXACT_SEED = 1000, 2000
_FEW = 2000


class MixtureBoard(Board):
    """Files of one mixture, in a folder named after its settings: other settings never meet these results."""

    recommended = "2x2_path_8"
    baseline_updates = 1200
    lrs = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    selecting = (100, 101)

    def __init__(self, work_dir: Path, kind: str, settings: Settings | None = None, samples: int = 5000) -> None:
        self.kind, self.samples, self.title = kind, samples, KINDS[kind].title
        self.reference_titles = {"exact": "exact samples"}
        self.mixture = KINDS[kind].mixture
        self.settings = replace(settings or Settings(width=64), shift=KINDS[kind].shift)
        self.shift = self.settings.shift
        self.folder = work_dir / f"{kind}-{identity_of(self.describe())}"
        write_text(self.folder / "settings.json", json.dumps(self.describe(), indent=1) + "\n")

    def describe(self) -> dict[str, object]:
        """Settings for the report."""
        return {**self.settings.as_dict(), "samples": self.samples, "kind": self.kind}

    @cached_property
    def initial(self) -> VelocityNetwork:
        """The network that all roles start from."""
        path = self.folder / "initial.safetensors"
        if not path.exists():
            write_tensors(path, fit_initial_network(self.mixture, self.settings).state_dict(), {})
        network = self._network(load_file(path))
        return network.requires_grad_(False)

    def _network(self, state: dict[str, Tensor]) -> VelocityNetwork:
        network = VelocityNetwork(self.settings.width, self.mixture.dimensions)
        network.load_state_dict(state)
        return network

    # --- runs ------------------------------------------------------------

    def cost(self, method: Method) -> tuple[float, float]:
        """Network evaluations of an update: forward, and those that run backward."""
        plan, objective = self.settings.plan(method), self.settings.objective(method)
        return cost_of_updates(plan, objective, self.settings.fake_updates, draws=1, guidance=False)

    def measure(self, runs: Sequence[Run]) -> Iterator[Row]:
        """Train runs of one method at once, and measure them."""
        for run, done in zip(runs, distil_many(runs, self.mixture, self.initial, self.settings), strict=True):
            row = self._measured(run, done)
            write_row(self._path(run), row)
            yield row

    def row(self, run: Run) -> Row | None:
        """What was measured of a run; None before."""
        path = self._path(run)
        return read_row(path) if path.exists() else None

    def _path(self, run: Run) -> Path:
        return self.folder / "rows" / f"{run.name}.json"

    def refined(self, run: Run, steps: int) -> float | None:
        """The score in more steps; None where it was not measured."""
        row = self.row(run)
        found = row.extra.get(f"refined_{steps}") if row else None
        return None if found is None else float(found)

    def refine(self, run: Run) -> None:
        """Every row has it."""

    # --- measures ------------------------------------------------------------

    def references(self) -> list[Row]:
        """The noise floor: exact samples."""
        exact, rows = Method("exact", "exact samples", ()), []
        for seed in range(3):
            samples = self.mixture.sample(self.samples, torch.Generator().manual_seed(_EXACT_SEED + 1 + seed))
            rows.append(self._row(Run(exact, 0.0, seed, 0), samples, {}))
        return rows

    def teacher(self, noise: Tensor, steps: int = 50) -> Tensor:
        """The teacher's sample of the same noise."""
        sigmas = [shift_sigma(1 - i / steps, self.settings.shift) for i in range(steps)]
        return sample(self.mixture.velocity, sigmas, noise)

    def _noise(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(_NOISE_SEED + seed)
        return torch.randn(self.samples, self.mixture.dimensions, generator=generator)

    def _measured(self, run: Run, done: Distilled) -> Row:
        plan, noise = self.settings.plan(run.method), self._noise(run.seed)
        networks = MixtureNetworks(self.mixture, {n: self._network(own) for n, own in done.experts.items()}, {})
        velocity = route(expert_velocities(networks, plan, NOTHING), plan)

        def walked(plan: PhasePlan) -> Tensor:
            return sample(velocity, plan.sigmas, noise).nan_to_num(0.0, 100.0, -100.0)

        samples, extra = walked(plan), {}
        for steps in REFINED:
            if steps > len(plan.sigmas) and run.seed not in self.selecting:
                extra[f"refined_{steps}"] = kernel_distance_to_exact(walked(plan.refined(steps)), self.mixture)
        extra["same_noise"] = float((samples - self.teacher(noise)).square().mean().sqrt())
        forward, backward = self.cost(run.method)
        extra |= {"forward": forward, "backward": backward, "evaluations": sum(done.evaluations.values())}
        return self._row(run, samples, extra)

    def _row(self, run: Run, samples: Tensor, extra: dict[str, float]) -> Row:
        exact = self.mixture.sample(self.samples, torch.Generator().manual_seed(_EXACT_SEED))
        few = min(_FEW, len(samples))
        return Row(
            teacher=self.kind,
            method=run.method.key,
            seed=run.seed,
            network_evaluations=sum(run.method.steps),
            frechet=frechet_distance(samples, exact),
            diversity=pairwise_distance(samples[:few], torch.zeros(few, dtype=torch.long)),
            motion=None,
            lr=run.lr,
            updates=run.updates,
            score=kernel_distance_to_exact(samples, self.mixture),
            extra={
                "mode_weight_error": mode_weight_error(samples, self.mixture),
                "off_modes": share_off_modes(samples, self.mixture),
                "variance_in_modes": variance_in_modes(samples, self.mixture),
                **extra,
            },
        )

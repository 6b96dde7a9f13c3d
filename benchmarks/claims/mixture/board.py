"""Variants on the mixtures at equal network evaluations: chosen on seeds that are not reported, reported on others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.claims.common.distilling import Distilled
from benchmarks.claims.common.evidence import Row, best_lr
from benchmarks.claims.common.files import identity_of, read_row, write_row, write_tensors, write_text
from benchmarks.claims.common.methods import Method, Run
from benchmarks.claims.common.variants import VARIANTS, cost_of_updates, equal_updates, weight_of
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
from pdmd_core.distillation import expert_velocities
from pdmd_core.metrics import frechet_distance, pairwise_distance
from pdmd_core.noise_level import shift_sigma
from pdmd_core.phases import PhasePlan
from pdmd_core.rollout import route, sample

SELECTING, REPORTED = (100, 101), (0, 1, 2, 3, 4)
"""Seeds."""
LRS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Learning rates: the middle three are tried first, then the next beyond the best until that is not at an end."""
BASELINE, UPDATES = "phased_2x2", 1200
"""What an equal number of evaluations is that of."""
REFINED = (8, 16)
"""Steps to which plans of four steps are refined."""
_NOISE_SEED, _EXACT_SEED = 1000, 2000
_FEW = 2000


class Board:
    """Files of one mixture, in a folder named after its settings: other settings never meet these results."""

    def __init__(self, work_dir: Path, kind: str, settings: Settings | None = None, samples: int = 5000) -> None:
        self.kind, self.samples = kind, samples
        self.mixture = KINDS[kind].mixture
        self.settings = replace(settings or Settings(width=64), shift=KINDS[kind].shift)
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

    # --- which runs ------------------------------------------------------------

    def cost(self, method: Method) -> tuple[float, float]:
        """Network evaluations of an update: forward, and those that run backward."""
        settings = self.settings
        return cost_of_updates(
            settings.plan(method), settings.objective(method), settings.fake_updates, draws=1, guidance=False
        )

    def updates(self, method: Method, baseline: int = UPDATES) -> int:
        """Updates of a method that cost what those of the baseline do."""
        own, whole = (weight_of(*self.cost(one)) for one in (method, VARIANTS[BASELINE]))
        return equal_updates(method, own, whole, baseline)

    def runs(self, method: Method, lrs: Sequence[float], seeds: Sequence[int]) -> list[Run]:
        """Of a method, at these learning rates with these seeds."""
        updates = self.updates(method)
        return [Run(method, lr, seed, updates) for seed in seeds for lr in lrs]

    def chosen(self, method: Method) -> float | None:
        """The learning rate that was best on the seeds that decide; None before that is known."""
        lr, undecided = self._best(method)
        return None if undecided else lr

    def _best(self, method: Method) -> tuple[float | None, list[float]]:
        """The best learning rate so far, and those that must be tried yet."""
        found = [row for row in map(self.row, self.runs(method, LRS, SELECTING)) if row is not None]
        tried = {lr for lr in LRS if sum(row.lr == lr for row in found) == len(SELECTING)}
        middle = len(LRS) // 2
        lr = best_lr([row for row in found if row.lr in tried], method.key, self.updates(method))
        place = middle if lr is None else LRS.index(lr)
        wanted = {*LRS[middle - 1 : middle + 2], *LRS[max(place - 1, 0) : place + 2]}
        return lr, [lr for lr in LRS if lr in wanted - tried]

    def reported(self, method: Method) -> list[Row]:
        """The rows of a method that are there, of the seeds that did not decide."""
        lr = self.chosen(method)
        rows = [] if lr is None else [self.row(run) for run in self.runs(method, [lr], REPORTED)]
        return [row for row in rows if row is not None]

    def work(self, methods: Sequence[Method]) -> Iterator[Row]:
        """Train and measure what is not there yet, method by method."""
        for method in methods:
            while undecided := self._best(method)[1]:
                yield from self._done(self.runs(method, undecided, SELECTING))
            lr = self.chosen(method)
            assert lr is not None
            yield from self._done(self.runs(method, [lr], REPORTED))

    def _done(self, runs: Sequence[Run]) -> Iterator[Row]:
        missing = [run for run in runs if self.row(run) is None]
        if not missing:
            return
        for run, done in zip(missing, distil_many(missing, self.mixture, self.initial, self.settings), strict=True):
            row = self._measured(run, done)
            write_row(self._path(run), row)
            yield row

    def row(self, run: Run) -> Row | None:
        """What was measured of a run; None before."""
        path = self._path(run)
        return read_row(path) if path.exists() else None

    def _path(self, run: Run) -> Path:
        return self.folder / "rows" / f"{run.name}.json"

    # --- measures ------------------------------------------------------------

    def exact(self, seed: int) -> Row:
        """The noise floor."""
        samples = self.mixture.sample(self.samples, torch.Generator().manual_seed(_EXACT_SEED + 1 + seed))
        return self._row(Run(Method("exact", "exact samples", ()), 0.0, seed, 0), samples, {})

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
        if len(plan.sigmas) == 4:
            for steps in REFINED:
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

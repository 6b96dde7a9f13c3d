"""Variants on pictures or clips at equal network evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.claims.common.board import REFINED, Board
from benchmarks.claims.common.evidence import Row
from benchmarks.claims.common.methods import Method, Run
from benchmarks.claims.common.variants import OF_RECIPES, VARIANTS, cost_of_updates
from benchmarks.claims.embedded.gallery import Shown
from benchmarks.claims.embedded.study import SETTINGS, EmbeddedStudy

_SHOWN = ("dmd_sgts", "phased_2x2", "phased_4x1", "4_step", OF_RECIPES, "2x2_path")
"""Variants whose samples are shown beside each other."""


class EmbeddedBoard(Board):
    """The board of one kind of samples, on the files of its study."""

    recommended = OF_RECIPES
    baseline_updates = EmbeddedStudy.updates
    lrs = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    selecting = (100,)

    def __init__(self, work_dir: Path, teacher: str, guidance_scale: float | None = None) -> None:
        self.title = teacher if guidance_scale is None else f"{teacher}, guidance {guidance_scale:g}"
        settings = SETTINGS[teacher]
        self.study = EmbeddedStudy(
            work_dir, teacher, replace(settings, guidance_scale=guidance_scale or settings.guidance_scale)
        )
        self.reference_titles = {**self.study.references, "experts_4": "shipped experts, 4 steps"}
        self.shift = self.study.settings.shift

    def cost(self, method: Method) -> tuple[float, float]:
        """Network evaluations of an update: forward, and those that run backward."""
        settings = self.study.settings
        recipe, plan, objective = settings.recipe_of(method), settings.plan(method), settings.objective(method)
        guided = objective.guidance_scale != 1
        return cost_of_updates(plan, objective, recipe.fake_updates, recipe.draws_per_rollout, guided)

    def row(self, run: Run) -> Row | None:
        """What was measured of a run; None before."""
        return self.study.row(run) if self.study.has_row(run) else None

    def measure(self, runs: Sequence[Run]) -> Iterator[Row]:
        """Train and measure runs."""
        self.study.prepare()
        yield from map(self.study.row, runs)

    def refined(self, run: Run, steps: int) -> float | None:
        """The score in more steps; None before that was measured."""
        return self.study.row(run, steps).score if self.study.has_row(run, steps) else None

    def refine(self, run: Run) -> None:
        """Measure what more steps make of a run's experts."""
        for steps in REFINED:
            if steps > sum(run.method.steps):
                self.study.row(run, steps)

    def references(self) -> list[Row]:
        """Rows of the teacher, and of the experts where they teach."""
        names = [name for name in self.study.references if name != "data"]
        taught = any(self.reported(method) for method in VARIANTS.values() if method.of_experts)
        return [self.study.reference_row(name, 0) for name in [*names, *(["experts_4"] if taught else [])]]

    def shown(self) -> Shown:
        """The teacher in many steps and in four, and variants of the first reported seed; nothing without variants."""
        runs: list[tuple[str, Run | int]] = []
        for method in map(VARIANTS.__getitem__, _SHOWN):
            runs += [
                (method.title, Run(method, row.lr or 0.0, row.seed, row.updates)) for row in self.reported(method)[:1]
            ]
        steps = self.study.measuring.teacher_steps
        teachers = [(self.study.references[f"teacher_{count}"], count) for count in (steps, 4)]
        return [*teachers, *runs] if runs else []

"""The methods that are compared, and what one training run of them is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pdmd_core.roles import RoleSpec


@dataclass(frozen=True)
class Method:
    """A phase plan and the choices that differ from the recipe. One step in one phase is DMD, and so on."""

    key: str
    """In file names and rows."""
    title: str
    steps: tuple[int, ...]
    """Steps of each phase; their sum is the number of network evaluations of a sample."""
    objective: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``pdmd_core.distillation.Objective`` that are not the default."""
    joint: bool = False
    """All phases are trained in turn, one update each, instead of one phase after the other."""
    ablation_of: str | None = None
    """The method that it is, but for one choice."""
    shift: float | None = None
    """Of its steps; that of all methods on a teacher when None."""
    of_experts: bool = False
    """The shipped four-step experts teach, in place of the model of which they were distilled."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the recipe that are not those of all methods on a teacher."""
    expert: RoleSpec | None = None
    """How experts hold their weights, where not as all methods on a teacher."""
    fake: RoleSpec | None = None
    """How fakes do."""


METHODS = {
    method.key: method
    for method in (
        Method("dmd_one_step", "DMD, one step", (1,)),
        Method("dmd_sgts", "DMD, four steps with SGTS", (4,)),
        Method("phased_4x1", "Phased DMD, 4 x 1", (1, 1, 1, 1)),
        Method("phased_2x2", "Phased DMD, 2 x 2 with SGTS", (2, 2)),
        Method("biased_4x1", "4 x 1, biased target", (1, 1, 1, 1), {"fake_target": "biased"}, False, "phased_4x1"),
        Method("biased", "2 x 2, biased target", (2, 2), {"fake_target": "biased"}, False, "phased_2x2"),
        Method("disjoint", "2 x 2, disjoint ranges", (2, 2), {"score_range": "disjoint"}, False, "phased_2x2"),
        Method("margin", "2 x 2, margin instead of clamp", (2, 2), {"fake_weighting": "margin"}, False, "phased_2x2"),
        Method("paper_weight", "2 x 2, paper weight", (2, 2), {"generator_weighting": "paper"}, False, "phased_2x2"),
        Method("joint", "2 x 2, phases trained jointly", (2, 2), {}, True, "phased_2x2"),
    )
}


@dataclass(frozen=True)
class Run:
    """One training: a method at a learning rate, with a seed, for a number of generator updates over all phases."""

    method: Method
    lr: float
    seed: int
    updates: int

    @property
    def name(self) -> str:
        """Of its cached file, without suffix."""
        return f"{self.method.key}-lr-{self.lr:g}-updates-{self.updates}-seed-{self.seed}"


def runs(methods: Sequence[str], lrs: Sequence[float], seeds: Sequence[int], updates: int) -> list[Run]:
    """Every method at every learning rate with every seed; seed by seed, so that a cut-off grid is a whole one."""
    return [Run(METHODS[key], lr, seed, updates) for seed in seeds for lr in lrs for key in methods]

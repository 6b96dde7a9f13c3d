"""What the rows say about each claim of the paper. Nothing here knows an outcome."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims.common.evidence import (
    Row,
    Spread,
    markdown_table,
    read_evidence,
    recommended_of,
    rounded,
    rows_of,
    spread,
    write_evidence,
)
from benchmarks.claims.common.methods import METHODS
from benchmarks.claims.common.variants import BASELINE as PHASED_BASELINE
from benchmarks.claims.common.variants import VARIANTS

DIVERSITY_SHARE = 0.95
FLOW_SHARE = 0.9
PHASED = ("phased_2x2", "phased_4x1")
BASELINE = "dmd_sgts"
BUDGETS = {
    "equal": "equal updates",
    "longest": "best of all numbers of updates",
    "evaluations": "equal network evaluations of training, seeds that chose nothing",
    "third": "a third of the network evaluations of the others, seeds that chose nothing",
    "against_longest": "against the others at the best of all their numbers of updates",
}
MEASURES = {
    "frechet": "Frechet distance",
    "diversity": "diversity",
    "motion": "optical flow",
    "score": "kernel distance",
    "boundary_kernel_distance": "kernel distance at the first boundary",
}


class Verdict:
    """The claims on one teacher, at one budget, of the rows of each method at its best learning rate."""

    def __init__(
        self, teacher: str, budget: str, methods: Mapping[str, Sequence[Row]], references: Sequence[Row]
    ) -> None:
        self.teacher, self.budget, self.methods, self.references = teacher, budget, dict(methods), references

    @classmethod
    def of_updates(cls, teacher: str, rows: Sequence[Row], updates: int, budget: str) -> Verdict:
        """Budget "equal": all of ``updates`` generator updates; "longest": each method at the number of updates with
        its lowest mean score, of those that were run with the most seeds.
        """
        trained: dict[str, dict[int, list[Row]]] = {}
        for row in rows:
            if row.teacher == teacher and row.lr is not None:
                trained.setdefault(row.method, {}).setdefault(row.updates, []).append(row)
        methods = {}
        for method, by_updates in trained.items():
            at = _best_updates(by_updates) if budget == "longest" else updates
            methods[method] = by_updates.get(at, [])
        return cls(teacher, budget, methods, _references(rows, teacher))

    def entries(self) -> list[dict[str, Any]]:
        """One for each claim; ``holds`` is null where runs are missing."""
        found = [entry for key in PHASED for entry in self.against_sgts(key)]
        if self.budget == "equal":  # ablations are not trained for longer
            for biased, unbiased in (("biased_4x1", "phased_4x1"), ("biased", "phased_2x2")):
                found += self.against_biased(biased, unbiased)
        return found

    def against_sgts(self, key: str) -> list[dict[str, Any]]:
        """Of a method with phases: nearer to the teacher, and with more of what it can do."""
        if self.teacher == "mixture":
            return [self.better(key, BASELINE, "score", lower=True)]
        found = [
            self.better(key, BASELINE, "frechet", lower=True),
            self.better(key, BASELINE, "diversity", lower=False),
            self.keeps(key, "diversity", DIVERSITY_SHARE),
        ]
        if self.teacher == "clips":
            found += [self.better(key, BASELINE, "motion", lower=False), self.keeps(key, "motion", FLOW_SHARE)]
        return found

    def recommended(self, key: str) -> list[dict[str, Any]]:
        """Of the recommended method: it beats the paper's plan as it is and SGTS, and keeps what the teacher can do."""
        if not _many_step_teacher(self.references):
            return [self.better(key, other, "score", lower=True) for other in (PHASED_BASELINE, BASELINE)]
        spreads = ("diversity", "motion") if self.teacher == "clips" else ("diversity",)
        found = []
        for other in (PHASED_BASELINE, BASELINE):
            found.append(self.better(key, other, "frechet", lower=True))
            for column in spreads:
                found += [self.better(key, other, column, lower=False), self.nearer(key, other, column)]
        shares = {"diversity": DIVERSITY_SHARE, "motion": FLOW_SHARE}
        return [*found, *(self.keeps(key, column, shares[column]) for column in spreads)]

    def against_biased(self, biased: str, unbiased: str) -> list[dict[str, Any]]:
        """What the target inside a subinterval is worth."""
        if self.teacher == "mixture":
            return [self.worse(biased, unbiased, column) for column in ("score", "boundary_kernel_distance")]
        return [self.worse(biased, unbiased, "frechet"), self.better(unbiased, biased, "diversity", lower=False)]

    def better(self, method: str, other: str, column: str, lower: bool) -> dict[str, Any]:
        """Better than the other by more than the spread: means are further apart than both deviations together."""
        sign = -1.0 if lower else 1.0
        claim = f"{_title(method)} beats {_title(other)}: {MEASURES[column]}"
        return self._compared(claim, method, other, column, lambda a, b: sign * (a.mean - b.mean) > _both(a, b))

    def worse(self, method: str, other: str, column: str) -> dict[str, Any]:
        """The converse, of columns where less is better."""
        claim = f"{_title(method)} is worse than {_title(other)}: {MEASURES[column]}"
        return self._compared(claim, method, other, column, lambda a, b: a.mean - b.mean > _both(a, b))

    def nearer(self, method: str, other: str, column: str) -> dict[str, Any]:
        """Nearer to the many-step teacher's mean than the other, by more than both deviations together."""
        teacher = spread(self._teacher(), column)
        claim = f"{_title(method)} is nearer to the teacher's {MEASURES[column]} than {_title(other)}"

        def holds(a: Spread, b: Spread) -> bool:
            return teacher is not None and abs(b.mean - teacher.mean) - abs(a.mean - teacher.mean) > _both(a, b)

        return self._compared(claim, method, other, column, holds)

    def keeps(self, method: str, column: str, share: float) -> dict[str, Any]:
        """At least this share of the many-step teacher's mean."""
        teacher = self._teacher()
        claim = f"{_title(method)} keeps at least {share:.0%} of the teacher's {MEASURES[column]}"
        entry = self._entry(claim, method, column, self.methods.get(method, []), teacher, "teacher")
        own, other = spread(self.methods.get(method, []), column), spread(teacher, column)
        if own is not None and other is not None:
            entry |= {"share": own.mean / other.mean, "holds": own.mean >= share * other.mean}
        return entry

    def _teacher(self) -> list[Row]:
        return [row for row in self.references if row.method == _many_step_teacher(self.references)]

    def _compared(
        self, claim: str, method: str, other: str, column: str, holds: Callable[[Spread, Spread], bool]
    ) -> dict[str, Any]:
        rows, others = self.methods.get(method, []), self.methods.get(other, [])
        entry = self._entry(claim, method, column, rows, others, other)
        a, b = spread(rows, column), spread(others, column)
        if a is not None and b is not None and min(a.count, b.count) > 1:
            entry["holds"] = holds(a, b)
        return entry

    def _entry(
        self, claim: str, method: str, column: str, rows: Sequence[Row], others: Sequence[Row], other: str
    ) -> dict[str, Any]:
        entry: dict[str, Any] = {"teacher": self.teacher, "budget": self.budget, "claim": claim, "holds": None}
        entry |= {"method": method, "compared_with": other, "measure": column}
        for name, found in (("value", spread(rows, column)), ("other", spread(others, column))):
            entry[name] = found.mean if found else None
            entry[f"{name}_deviation"] = found.deviation if found and not math.isnan(found.deviation) else None
            entry[f"{name}_seeds"] = found.count if found else 0
        return entry


def verdict(rows: Sequence[Row], updates: Mapping[str, int]) -> list[dict[str, Any]]:
    """All claims on all teachers; ``updates`` has the equal number of each. "longest" where a run is longer."""
    entries = []
    for teacher in updates:
        longer = any(row.teacher == teacher and row.updates > updates[teacher] for row in rows)
        for budget in ("equal", "longest") if longer else ("equal",):
            entries += Verdict.of_updates(teacher, rows, updates[teacher], budget).entries()
    return [rounded(entry) for entry in entries]


def verdict_of_recommended(
    recommended: Mapping[str, str], board: Sequence[Row], rows: Sequence[Row]
) -> list[dict[str, Any]]:
    """The claims about the recommended method.

    Args:
        recommended: Teacher to the key of the method that is recommended there.
        board: Rows of the leaderboard; the column ``share`` is that of the baseline's network evaluations.
        rows: Those of ``paper_claims.py``, which has longer trainings.
    """
    entries = []
    for teacher, key in recommended.items():
        references = _references(rows, teacher)
        whole = _by_method(board, teacher, 1.0)
        third = {**whole, key: _by_method(board, teacher, 1 / 3).get(key, [])}
        budgets: dict[str, Mapping[str, Sequence[Row]]] = {"evaluations": whole, "third": third}
        if any(row.teacher == teacher for row in rows):
            longest = Verdict.of_updates(teacher, rows, 0, "longest").methods
            budgets["against_longest"] = longest | {key: whole.get(key, [])}
        for budget, methods in budgets.items():
            if methods.get(key):
                entries += Verdict(teacher, budget, methods, references).recommended(key)
    return [rounded(entry) for entry in entries]


def _by_method(board: Sequence[Row], teacher: str, share: float) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in board:
        if row.teacher == teacher and row.lr is not None and math.isclose(row.extra["share"] or 0, share, rel_tol=0.01):
            found.setdefault(row.method, []).append(row)
    return found


def _references(rows: Sequence[Row], teacher: str) -> list[Row]:
    return [row for row in rows if row.teacher == teacher and row.lr is None]


def write_verdict(folder: Path) -> None:
    """Judge the rows of paper_claims.json: its ``verdict``, and verdict.md."""
    data = read_evidence(folder / "paper_claims.json")
    updates = {teacher: settings["updates"] for teacher, settings in sorted(data["settings"].items())}
    rows, board = rows_of(data, "rows"), rows_of(data, "leaderboard")
    data["verdict"] = verdict(rows, updates) + verdict_of_recommended(recommended_of(data), board, rows)
    write_evidence(folder / "paper_claims.json", data)
    (folder / "verdict.md").write_text(markdown(data["verdict"]), encoding="utf-8")


def markdown(entries: Sequence[Mapping[str, Any]]) -> str:
    """A table for each teacher and budget."""
    parts = [
        "# Verdict",
        "",
        'Computed by `benchmarks/paper_claims.py` from the rows of [paper_claims.json](paper_claims.json). "Beats" and '
        '"worse": the means over seeds are further apart than both standard deviations together.',
        "",
    ]
    for teacher, budget in dict.fromkeys((entry["teacher"], entry["budget"]) for entry in entries):
        own = [entry for entry in entries if (entry["teacher"], entry["budget"]) == (teacher, budget)]
        lines = [
            [
                entry["claim"],
                {True: "yes", False: "no", None: "not measured"}[entry["holds"]],
                _number(entry, "value"),
                _number(entry, "other"),
                f"{entry['share']:.1%}" if "share" in entry else "",
            ]
            for entry in own
        ]
        header = ("claim", "holds", "value", "compared with", "share")
        parts += [f"## {teacher}, {BUDGETS[budget]}", "", markdown_table(header, lines), ""]
    return "\n".join(parts)


def _number(entry: Mapping[str, Any], name: str) -> str:
    if entry[name] is None:
        return ""
    deviation = entry[f"{name}_deviation"]
    return f"{entry[name]:.4g}" + (f" ± {deviation:.2g}" if deviation is not None else "")


def _title(method: str) -> str:
    return (VARIANTS | METHODS)[method].title


def _both(a: Spread, b: Spread) -> float:
    return a.deviation + b.deviation


def _best_updates(by_updates: Mapping[int, Sequence[Row]]) -> int:
    seeds = max(map(len, by_updates.values()))
    complete = [updates for updates, rows in by_updates.items() if len(rows) == seeds]
    return min(complete, key=lambda updates: statistics.mean(row.score for row in by_updates[updates]))


def _many_step_teacher(rows: Sequence[Row]) -> str | None:
    """The reference of the teacher with the most steps."""
    names = {row.method for row in rows if row.method.startswith("teacher_")}
    return max(names, key=lambda name: int(name.removeprefix("teacher_")), default=None)

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
    rounded,
    spread,
    write_evidence,
)
from benchmarks.claims.common.methods import METHODS

DIVERSITY_SHARE = 0.95
FLOW_SHARE = 0.9
PHASED = ("phased_2x2", "phased_4x1")
BASELINE = "dmd_sgts"
BUDGETS = {"equal": "equal updates", "longest": "best of all numbers of updates"}
MEASURES = {
    "frechet": "Frechet distance",
    "diversity": "diversity",
    "motion": "optical flow",
    "score": "kernel distance",
    "boundary_kernel_distance": "kernel distance at the first boundary",
}


class Verdict:
    """The claims on one teacher, at one budget.

    ``rows`` are those at the best learning rates. Budget "equal": all of ``updates`` generator updates; "longest": each
    method at the number of updates with its lowest mean score, of those that were run with the most seeds.
    """

    def __init__(self, teacher: str, rows: Sequence[Row], updates: int, budget: str) -> None:
        self.teacher, self.budget = teacher, budget
        mine = [row for row in rows if row.teacher == teacher]
        self.references = [row for row in mine if row.lr is None]
        trained: dict[str, dict[int, list[Row]]] = {}
        for row in mine:
            if row.lr is not None:
                trained.setdefault(row.method, {}).setdefault(row.updates, []).append(row)
        self.methods = {}
        for method, by_updates in trained.items():
            at = _best_updates(by_updates) if budget == "longest" else updates
            self.methods[method] = by_updates.get(at, [])

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

    def keeps(self, method: str, column: str, share: float) -> dict[str, Any]:
        """At least this share of the many-step teacher's mean."""
        teacher = [row for row in self.references if row.method == _many_step_teacher(self.references)]
        claim = f"{_title(method)} keeps at least {share:.0%} of the teacher's {MEASURES[column]}"
        entry = self._entry(claim, method, column, self.methods.get(method, []), teacher, "teacher")
        own, other = spread(self.methods.get(method, []), column), spread(teacher, column)
        if own is not None and other is not None:
            entry |= {"share": own.mean / other.mean, "holds": own.mean >= share * other.mean}
        return entry

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
        for budget in BUDGETS if longer else ["equal"]:
            entries += Verdict(teacher, rows, updates[teacher], budget).entries()
    return [rounded(entry) for entry in entries]


def write_verdict(folder: Path) -> None:
    """Judge the rows of paper_claims.json: its ``verdict``, and verdict.md."""
    data = read_evidence(folder / "paper_claims.json")
    updates = {teacher: settings["updates"] for teacher, settings in sorted(data["settings"].items())}
    data["verdict"] = verdict([Row.from_dict(row) for row in data["rows"]], updates)
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
    return METHODS[method].title


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

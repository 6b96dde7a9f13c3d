"""Rows of measurements, and what is made of them: the best learning rate, mean and spread, JSON and tables."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

Value = float | int | None


@dataclass(frozen=True)
class Row:
    """One trained and measured run; lower scores are better and decide on the learning rate."""

    teacher: str
    method: str
    seed: int
    network_evaluations: int
    """Of one sample."""
    frechet: float
    diversity: float
    motion: float | None
    lr: float | None
    """None where nothing was trained."""
    updates: int
    """Generator updates over all phases."""
    score: float
    """On the mixture the squared kernel distance to the exact distribution."""
    extra: dict[str, Value] = field(default_factory=dict)
    """Columns that this teacher has beside the common ones."""

    def to_dict(self) -> dict[str, Any]:
        """Flat, as it is written."""
        data = asdict(self)
        extra = data.pop("extra")
        return {**data, **extra}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """Inverse of ``to_dict``."""
        own = {name: data[name] for name in cls.__dataclass_fields__ if name != "extra"}
        return cls(**own, extra={name: value for name, value in data.items() if name not in own})

    def value(self, column: str) -> Value:
        """A common or an extra column."""
        return self.extra[column] if column in self.extra else getattr(self, column)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """NaN as deviation for one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(statistics.mean(values), deviation, len(values))

    def text(self, scale: float = 1.0, digits: int = 2) -> str:
        """``1.23 ± 0.04`` after multiplication with scale."""
        mean = f"{self.mean * scale:.{digits}f}"
        return mean if math.isnan(self.deviation) else f"{mean} ± {self.deviation * scale:.{digits}f}"


def spread(rows: Iterable[Row], column: str) -> Spread | None:
    """Of one column; None where a row has no value."""
    values = [row.value(column) for row in rows]
    return Spread.of([float(v) for v in values if v is not None]) if values and None not in values else None


def best_lr(rows: Sequence[Row], method: str, updates: int, grid_seeds: int | None = None) -> float | None:
    """The learning rate with the lowest mean score over seeds; None when the method was not trained for so long.

    Only learning rates with as many seeds as the most complete one compete. grid_seeds: only the first so many seeds
    decide, where the others were run at the best learning rate alone.
    """
    by_lr: dict[float, list[float]] = {}
    for row in rows:
        decides = grid_seeds is None or row.seed < grid_seeds
        if row.method == method and row.updates == updates and row.lr is not None and decides:
            by_lr.setdefault(row.lr, []).append(row.score)
    if not by_lr:
        return None
    seeds = max(map(len, by_lr.values()))
    return min((lr for lr, scores in by_lr.items() if len(scores) == seeds), key=lambda lr: statistics.mean(by_lr[lr]))


def best_rows(rows: Sequence[Row], method: str, updates: int, grid_seeds: int | None = None) -> list[Row]:
    """The rows of a method at its best learning rate, by seed."""
    lr = best_lr(rows, method, updates, grid_seeds)
    chosen = [row for row in rows if row.method == method and row.updates == updates and row.lr == lr]
    return sorted(chosen, key=lambda row: row.seed)


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


_SECTIONS = ("recommended", "verdict", "rows", "grid", "leaderboard")


def read_evidence(path: Path) -> dict[str, Any]:
    """paper_claims.json: ``settings`` by teacher, and lists of objects; empty when it is not there."""
    empty: dict[str, Any] = {"settings": {}} | {section: [] for section in _SECTIONS}
    return empty | json.loads(path.read_text(encoding="utf-8")) if path.exists() else empty


def rows_of(data: Mapping[str, Any], section: str) -> list[Row]:
    """The rows of a section of paper_claims.json: ``rows`` or ``leaderboard``."""
    return [Row.from_dict(row) for row in data[section]]


def recommended_of(data: Mapping[str, Any]) -> dict[str, str]:
    """Teacher to the method that is recommended there."""
    return {entry["teacher"]: entry["method"] for entry in data["recommended"]}


def write_evidence(path: Path, data: Mapping[str, Any]) -> None:
    """Inverse of ``read_evidence``; an object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = ",\n".join(
        f'"{section}": [\n' + ",\n".join("  " + json.dumps(entry) for entry in data[section]) + "\n]"
        for section in _SECTIONS
    )
    path.write_text(f'{{\n"settings": {json.dumps(data["settings"], indent=1)},\n{lists}\n}}\n', encoding="utf-8")


def update_board(path: Path, teacher: str, recommended: Mapping[str, Any] | None, rows: Sequence[Row]) -> None:
    """Write a teacher's part of the leaderboard, and which of its methods is recommended; that of others stays."""
    data = read_evidence(path)
    own_rows = [rounded(row.to_dict()) for row in rows]
    own = {"leaderboard": own_rows, "recommended": [{"teacher": teacher, **recommended}] if recommended else []}
    for section, entries in own.items():
        others = [entry for entry in data[section] if entry["teacher"] != teacher]
        data[section] = sorted(others + entries, key=itemgetter("teacher"))
    write_evidence(path, data)


def update_json(path: Path, teacher: str, rows: Sequence[Row], all_rows: Sequence[Row], settings: object) -> None:
    """Write a teacher's part of the evidence; that of other teachers stays.

    ``rows`` are those at the best learning rate, ``grid`` the mean score of every method at every learning rate.
    """
    data = read_evidence(path)
    data["settings"][teacher] = settings
    for section, own in (("rows", [rounded(row.to_dict()) for row in rows]), ("grid", _grid(teacher, all_rows))):
        others = [entry for entry in data[section] if entry["teacher"] != teacher]
        data[section] = sorted(others + own, key=itemgetter("teacher"))  # whichever teacher was reported last
    write_evidence(path, data)


def _grid(teacher: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    cells = []
    for method, updates, lr in sorted({(row.method, row.updates, row.lr) for row in rows if row.lr is not None}):
        scores = [row.score for row in rows if (row.method, row.updates, row.lr) == (method, updates, lr)]
        found = Spread.of(scores)
        deviation = None if math.isnan(found.deviation) else found.deviation
        cell = {"teacher": teacher, "method": method, "updates": updates, "lr": lr, "seeds": found.count}
        cells.append(rounded({**cell, "score": found.mean, "score_deviation": deviation}))
    return cells


def rounded(data: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers to five significant digits: more is noise."""
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in data.items()}

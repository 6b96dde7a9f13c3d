"""The table that the README shows: the methods without ablations on pictures and clips, by what decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.claims.common.evidence import Row, markdown_table, read_evidence, recommended_of, rows_of, spread
from benchmarks.claims.common.methods import METHODS
from benchmarks.claims.common.variants import VARIANTS

TEACHER = "teacher_40"
_RECOMMENDED = "recommended"
TITLES = {TEACHER: "teacher, 40 steps with guidance", "teacher_4": "teacher, 4 steps with guidance"} | {
    key: method.title for key, method in METHODS.items() if not method.ablation_of
}
COLUMNS = (
    ("pictures", "frechet", "pictures: FD-Emoji", 3),
    ("pictures", "diversity", "diversity", 0),
    ("clips", "frechet", "clips: FD-Emoji+flow", 1),
    ("clips", "diversity", "diversity", 0),
    ("clips", "motion", "optical flow", 0),
)
"""(teacher, measure, title, digits); diversity and optical flow are shares of the many-step teacher's mean."""


def summary(
    rows: Sequence[Row], updates: Mapping[str, int], recommended: Mapping[str, str], board: Sequence[Row]
) -> str:
    """Mean ± sample standard deviation over seeds, at the equal number of ``updates`` of each teacher.

    Below them stand the recommended methods (teacher to key) as the leaderboard has them, at as many network
    evaluations as the paper's plan. A cell is empty where nothing was measured, and a line is missing where all its
    cells are empty.
    """
    teachers = {teacher for teacher, *_ in COLUMNS}
    compared = [row for row in rows if row.teacher in teachers and row.updates in (0, updates[row.teacher])]
    for row in board:
        if row.method == recommended.get(row.teacher) and row.extra["share"] == 1 and row.teacher in teachers:
            compared.append(replace(row, method=_RECOMMENDED))
    keys = dict.fromkeys(key for teacher, key in recommended.items() if teacher in teachers)
    titles = TITLES | {_RECOMMENDED: f"{_RECOMMENDED}: {' / '.join(VARIANTS[key].title for key in keys)}"}
    lines = []
    for key, title in titles.items():
        cells = [_cell(compared, key, teacher, measure, digits) for teacher, measure, _, digits in COLUMNS]
        if any(cells):
            evaluations = next(row.network_evaluations for row in compared if row.method == key)
            lines.append([title, str(evaluations), *cells])
    return markdown_table(("method", "network evaluations", *(title for _, _, title, _ in COLUMNS)), lines) + "\n"


def _cell(rows: Sequence[Row], key: str, teacher: str, measure: str, digits: int) -> str:
    found = spread([row for row in rows if (row.teacher, row.method) == (teacher, key)], measure)
    if found is None:
        return ""
    if measure == "frechet":
        return found.text(digits=digits)
    whole = spread([row for row in rows if (row.teacher, row.method) == (teacher, TEACHER)], measure)
    return "" if whole is None else found.text(100 / whole.mean, digits) + " %"


def write_summary(folder: Path) -> None:
    """summary.md, from the rows of paper_claims.json."""
    data = read_evidence(folder / "paper_claims.json")
    updates = {teacher: settings["updates"] for teacher, settings in data["settings"].items()}
    text = summary(rows_of(data, "rows"), updates, recommended_of(data), rows_of(data, "leaderboard"))
    (folder / "summary.md").write_text(text, encoding="utf-8")

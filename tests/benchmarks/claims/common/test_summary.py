"""The README's table of the methods, on made-up rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from benchmarks.claims.common.evidence import Row, update_json
from benchmarks.claims.common.summary import summary, write_summary
from benchmarks.claims.common.variants import VARIANTS

UPDATES = {"pictures": 100, "clips": 50, "mixture": 10}


def row(teacher: str, method: str, seed: int, frechet: float, motion: float | None = None, updates: int = 0) -> Row:
    lr = 1e-3 if updates else None
    diversity = 4 * frechet
    return Row(teacher, method, seed, 4 if updates else 80, frechet, diversity, motion, lr, updates, score=0.0)


ROWS = [
    row("mixture", "teacher_40", 0, 99.0, updates=10),  # another teacher, another number of evaluations
    *(row("pictures", "teacher_40", seed, frechet) for seed, frechet in enumerate((1.0, 2.0, 3.0))),
    *(row("clips", "teacher_40", seed, 10.0, motion=2.0) for seed in range(2)),
    *(row("pictures", "dmd_sgts", seed, frechet, updates=100) for seed, frechet in enumerate((0.5, 1.5))),
    row("pictures", "dmd_sgts", 0, 77.0, updates=400),
    row("clips", "phased_2x2", 0, 5.0, motion=1.0, updates=50),
    row("pictures", "joint", 0, 5.0, updates=100),
]


def test_cells_are_mean_and_deviation_and_shares_of_the_many_step_teacher() -> None:
    lines = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in summary(ROWS, UPDATES, {}, []).splitlines()
    ]
    assert [line[0] for line in lines[2:]] == [
        "teacher, 40 steps with guidance",
        "DMD, four steps with SGTS",
        "Phased DMD, 2 x 2 with SGTS",
    ]
    teacher, sgts, phased = lines[2:]
    assert teacher[1:] == ["80", "2.000 ± 1.000", "100 ± 50 %", "10.0 ± 0.0", "100 ± 0 %", "100 ± 0 %"]
    assert sgts[1:4] == ["4", "1.000 ± 0.707", "50 ± 35 %"], "at the equal number of updates alone"
    assert phased[4:] == ["5.0", "50 %", "50 %"]


def test_the_recommended_method_has_a_line_of_the_leaderboards_whole_trainings() -> None:
    board = [
        replace(row("pictures", "2x2_own", seed, frechet, updates=90), extra={"share": share})
        for share, frechet in ((1.0, 1.0), (1 / 3, 50.0))
        for seed in range(2)
    ]
    board.append(replace(row("ring", "2x2_own", 0, 1.0, updates=90), extra={"share": 1.0}))
    lines = summary(ROWS, UPDATES, {"pictures": "2x2_own", "ring": "phased_4x1"}, board).splitlines()
    title = f"recommended: {VARIANTS['2x2_own'].title}"
    assert lines[-1] == f"| {title} | 4 | 1.000 ± 0.000 | 50 ± 0 % |  |  |  |"
    assert lines[:-1] == summary(ROWS, UPDATES, {}, []).splitlines()


def test_it_is_written_from_the_rows_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "paper_claims.json"
    for teacher, updates in UPDATES.items():
        update_json(file, teacher, [r for r in ROWS if r.teacher == teacher], [], {"updates": updates})
    assert json.loads(file.read_text())["settings"]["clips"] == {"updates": 50}
    write_summary(tmp_path)
    assert (tmp_path / "summary.md").read_text() == summary(ROWS, UPDATES, {}, [])

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.claims.common.evidence import Row, Spread, best_lr, best_rows, markdown_table, spread, update_json


def row(method: str, lr: float | None, seed: int, score: float, **changes) -> Row:
    values = {
        "teacher": "mixture",
        "network_evaluations": 4,
        "frechet": 0.5,
        "diversity": 1.5,
        "motion": None,
        "updates": 100,
        "extra": {"off_modes": score * 2},
    }
    return Row(method=method, lr=lr, seed=seed, score=score, **{**values, **changes})


ROWS = [
    row("phased", 1e-3, 0, 0.3),
    row("phased", 1e-3, 1, 0.5),
    row("phased", 3e-3, 1, 0.3),
    row("phased", 3e-3, 0, 0.2),
    row("phased", 1e-2, 0, 0.1),  # the best, but one seed is missing
    row("dmd", 3e-3, 0, 0.9),
    row("phased", 1e-3, 0, 0.01, updates=200),
]


def test_a_row_survives_its_file_flat() -> None:
    data = ROWS[0].to_dict()
    assert data["off_modes"] == 0.6
    assert data["motion"] is None
    assert "extra" not in data
    assert Row.from_dict(json.loads(json.dumps(data))) == ROWS[0]


def test_the_best_learning_rate_has_the_lowest_mean_over_all_seeds() -> None:
    assert best_lr(ROWS, "phased", 100) == 3e-3
    assert [r.score for r in best_rows(ROWS, "phased", 100)] == [0.2, 0.3]  # by seed
    assert best_lr(ROWS, "phased", 200) == 1e-3
    assert best_lr(ROWS, "dmd", 200) is None
    assert best_rows(ROWS, "dmd", 200) == []


def test_spread_is_the_mean_and_the_sample_deviation() -> None:
    found = Spread.of([1.0, 2.0, 3.0])
    assert (found.mean, found.deviation, found.count) == (2, 1, 3)
    assert found.text(10, 1) == "20.0 ± 10.0"
    assert math.isnan(Spread.of([5.0]).deviation)
    assert Spread.of([5.0]).text() == "5.00"
    assert spread(ROWS[:2], "off_modes").mean == pytest.approx(0.8)
    assert spread(ROWS[:2], "motion") is None


def test_a_table_has_as_many_rules_as_columns() -> None:
    assert markdown_table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_writing_one_teachers_rows_keeps_those_of_others(tmp_path: Path) -> None:
    path = tmp_path / "evidence" / "paper_claims.json"
    clip = row("dmd", 1e-3, 0, 0.123456789, teacher="clips", motion=2.0)
    update_json(path, "clips", [clip], [clip], {"frames": 9})
    for rows in (ROWS[:1], ROWS[:2]):
        update_json(path, "mixture", rows, ROWS, {"shift": 1.0})
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["settings"] == {"clips": {"frames": 9}, "mixture": {"shift": 1.0}}
    assert [(r["teacher"], r["seed"]) for r in data["rows"]] == [("clips", 0), ("mixture", 0), ("mixture", 1)]
    assert data["rows"][0]["score"] == 0.12346
    assert {"teacher", "method", "seed", "network_evaluations", "frechet", "diversity", "motion"} <= set(
        data["rows"][0]
    )
    grid = {(c["teacher"], c["method"], c["updates"], c["lr"]): c for c in data["grid"]}
    assert len(grid) == len(data["grid"]) == 6
    assert grid["mixture", "phased", 100, 1e-3]["score"] == pytest.approx(0.4)
    assert grid["mixture", "phased", 100, 1e-3]["seeds"] == 2
    assert grid["mixture", "dmd", 100, 3e-3]["score_deviation"] is None

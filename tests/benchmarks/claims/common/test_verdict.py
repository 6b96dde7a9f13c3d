"""Verdicts on made-up rows: each claim must be able to hold and to fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.claims.common.evidence import Row, update_board, update_json
from benchmarks.claims.common.variants import VARIANTS
from benchmarks.claims.common.verdict import verdict, verdict_of_recommended, write_verdict


def rows_of(teacher: str, method: str, values: dict[str, list[float]], updates: int = 100, lr: float | None = 1e-3):
    """A row for each seed; columns that are not given are 1."""
    count = len(next(iter(values.values())))
    rows = []
    for seed in range(count):
        own = {name: column[seed] for name, column in values.items()}
        common = {name: own.pop(name, 1.0) for name in ("frechet", "diversity", "motion", "score")}
        rows.append(Row(teacher, method, seed, 4, lr=lr, updates=updates if lr else 0, extra=own, **common))
    return rows


def find(entries: list[dict], method: str, measure: str, other: str, budget: str = "equal") -> dict:
    found = [
        entry
        for entry in entries
        if (entry["method"], entry["measure"], entry["compared_with"], entry["budget"])
        == (method, measure, other, budget)
    ]
    assert len(found) == 1
    return found[0]


PHASED = {"frechet": [1.0, 1.2, 1.1], "diversity": [0.95, 0.96, 0.97], "motion": [1.8, 1.8, 1.8]}
SGTS = {"frechet": [2.0, 2.2, 2.1], "diversity": [0.5, 0.6, 0.55], "motion": [0.9, 0.9, 0.9]}
TEACHER = {"frechet": [0.1, 0.1], "diversity": [1.0, 1.0], "motion": [2.0, 2.0]}


def clips(phased: dict[str, list[float]] = PHASED, sgts: dict[str, list[float]] = SGTS) -> list[dict]:
    rows = [
        *rows_of("clips", "teacher_40", TEACHER, lr=None),
        *rows_of("clips", "teacher_4", {"diversity": [9.0, 9.0], "motion": [9.0, 9.0]}, lr=None),
        *rows_of("clips", "phased_2x2", phased),
        *rows_of("clips", "dmd_sgts", sgts),
    ]
    return verdict(rows, {"clips": 100})


def test_claims_hold_when_the_numbers_say_so() -> None:
    entries = clips()
    better = find(entries, "phased_2x2", "frechet", "dmd_sgts")
    assert (better["holds"], better["value"], better["other"]) == (True, 1.1, 2.1)
    assert (better["value_deviation"], better["value_seeds"]) == (pytest.approx(0.1), 3)
    assert find(entries, "phased_2x2", "diversity", "dmd_sgts")["holds"] is True
    kept = find(entries, "phased_2x2", "diversity", "teacher")  # of the teacher with the most steps
    assert (kept["holds"], kept["share"]) == (True, pytest.approx(0.96))
    assert find(entries, "phased_2x2", "motion", "dmd_sgts")["holds"] is True
    flow = find(entries, "phased_2x2", "motion", "teacher")
    assert (flow["holds"], flow["share"]) == (True, pytest.approx(0.9))


@pytest.mark.parametrize(
    ("change", "measure", "other"),
    [
        ({"frechet": [1.9, 2.0, 2.1]}, "frechet", "dmd_sgts"),  # lower, but within the spread
        ({"frechet": [9.0, 9.1, 9.2]}, "frechet", "dmd_sgts"),
        ({"diversity": [0.2, 0.2, 0.2]}, "diversity", "dmd_sgts"),
        ({"diversity": [0.94, 0.94, 0.94]}, "diversity", "teacher"),
        ({"motion": [1.79, 1.79, 1.79]}, "motion", "teacher"),
        ({"motion": [0.9, 0.9, 0.9]}, "motion", "dmd_sgts"),
    ],
)
def test_claims_fail_when_the_numbers_say_so(change: dict, measure: str, other: str) -> None:
    entries = clips(PHASED | change)
    assert find(entries, "phased_2x2", measure, other)["holds"] is False
    others = [entry for entry in entries if entry["method"] == "phased_2x2" and entry["holds"] is not None]
    both = change.get("diversity") == [0.2, 0.2, 0.2] or change.get("motion") == [0.9, 0.9, 0.9]
    assert sum(not entry["holds"] for entry in others) == 1 + both, "no other claim, but for the share of the teacher's"


def test_what_was_not_run_is_not_judged() -> None:
    entries = clips()
    assert find(entries, "phased_4x1", "frechet", "dmd_sgts")["holds"] is None
    assert find(entries, "biased", "frechet", "phased_2x2")["holds"] is None
    one_seed = clips(sgts={name: values[:1] for name, values in SGTS.items()})
    assert find(one_seed, "phased_2x2", "frechet", "dmd_sgts")["holds"] is None  # no spread over one seed


def test_pictures_have_no_flow_and_the_mixture_its_own_claims() -> None:
    mixture = [
        *rows_of("mixture", "phased_4x1", {"score": [1.0, 1.1], "boundary_kernel_distance": [0.1, 0.1]}),
        *rows_of("mixture", "biased_4x1", {"score": [3.0, 3.1], "boundary_kernel_distance": [0.1, 0.1]}),
    ]
    rows = [*rows_of("pictures", "phased_2x2", PHASED), *mixture]
    entries = verdict(rows, {"mixture": 100, "pictures": 100})
    assert not [entry for entry in entries if entry["measure"] == "motion"]
    assert find([e for e in entries if e["teacher"] == "mixture"], "biased_4x1", "score", "phased_4x1")["holds"]
    assert not find(entries, "biased_4x1", "boundary_kernel_distance", "phased_4x1")["holds"]


def test_longer_training_is_judged_apart_at_the_best_number_of_updates() -> None:
    """SGTS gains from more updates and the phased method does not: the claim holds at equal updates alone."""
    rows = [
        *rows_of("pictures", "phased_2x2", PHASED | {"score": PHASED["frechet"]}),
        *rows_of("pictures", "phased_2x2", {"frechet": [5.0, 5.0, 5.0], "score": [5.0, 5.0, 5.0]}, 200),
        *rows_of("pictures", "dmd_sgts", SGTS | {"score": SGTS["frechet"]}),
        *rows_of("pictures", "dmd_sgts", {"frechet": [0.5, 0.5, 0.5], "score": [0.5, 0.5, 0.5]}, 200),
    ]
    entries = verdict(rows, {"pictures": 100})
    assert find(entries, "phased_2x2", "frechet", "dmd_sgts")["holds"] is True
    longest = find(entries, "phased_2x2", "frechet", "dmd_sgts", "longest")
    assert (longest["holds"], longest["value"], longest["other"]) == (False, 1.1, 0.5)
    assert "biased" in {entry["method"] for entry in entries if entry["budget"] == "equal"}
    assert {entry["method"] for entry in entries if entry["budget"] == "longest"} == {"phased_2x2", "phased_4x1"}


def test_a_longer_training_that_lacks_seeds_does_not_count() -> None:
    """One lucky seed at many updates must not stand for the method."""
    lucky = {"frechet": [0.1], "score": [0.1]}
    rows = [
        *rows_of("pictures", "phased_2x2", PHASED),
        *rows_of("pictures", "dmd_sgts", SGTS),
        *rows_of("pictures", "dmd_sgts", lucky, updates=200),
    ]
    longest = find(verdict(rows, {"pictures": 100}), "phased_2x2", "frechet", "dmd_sgts", "longest")
    assert (longest["holds"], longest["other"], longest["other_seeds"]) == (True, 2.1, 3)


def test_the_verdict_is_written_beside_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "paper_claims.json"
    rows = [*rows_of("pictures", "phased_2x2", PHASED), *rows_of("pictures", "dmd_sgts", SGTS)]
    update_json(path, "pictures", rows, rows, {"updates": 100})
    write_verdict(tmp_path)
    data = json.loads(path.read_text(encoding="utf-8"))
    assert len(data["rows"]) == 6
    assert find(data["verdict"], "phased_2x2", "frechet", "dmd_sgts")["holds"] is True
    text = (tmp_path / "verdict.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if "2 x 2 with SGTS beats DMD, four steps with SGTS: Fr" in line)
    assert line.endswith("| yes | 1.1 ± 0.1 | 2.1 ± 0.1 |  |")
    assert "| not measured |" in text
    update_json(path, "clips", [], [], {"updates": 100})  # another teacher's report keeps it
    assert json.loads(path.read_text(encoding="utf-8"))["verdict"] == data["verdict"]


def board_of(third: dict[str, list[float]] = PHASED) -> list[Row]:
    whole = {"phased_2x2": {"frechet": [1.6, 1.6, 1.7], "diversity": [1.3, 1.3, 1.3]}, "dmd_sgts": SGTS, "own": PHASED}
    return [
        *(row for key, values in whole.items() for row in rows_of("clips", key, values | {"share": [1.0] * 3})),
        *rows_of("clips", "own", third | {"share": [1 / 3] * 3}, updates=33),
    ]


@pytest.fixture
def _own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "own", replace(VARIANTS["2x2_own"], key="own"))


@pytest.mark.usefixtures("_own")
def test_the_recommended_method_is_judged_at_equal_evaluations_at_a_third_and_against_longer_trainings() -> None:
    paper = [
        *rows_of("clips", "teacher_40", TEACHER, lr=None),
        *rows_of("clips", "phased_2x2", {"frechet": [1.5, 1.5, 1.5], "score": [1.5, 1.5, 1.5]}),
        *rows_of("clips", "dmd_sgts", SGTS | {"score": SGTS["frechet"]}),
        *rows_of("clips", "dmd_sgts", {"frechet": [0.5, 0.5, 0.5], "score": [0.5, 0.5, 0.5]}, updates=400),
    ]
    worse = {"frechet": [1.6, 1.7, 1.8], "diversity": [0.9, 0.9, 0.9], "motion": [1.7, 1.7, 1.7]}
    entries = verdict_of_recommended({"clips": "own"}, board_of(worse), paper)
    holds = {
        (entry["budget"], entry["measure"], entry["compared_with"], "nearer" in entry["claim"]): entry["holds"]
        for entry in entries
    }
    assert holds["evaluations", "frechet", "phased_2x2", False] is True
    assert holds["evaluations", "diversity", "phased_2x2", False] is False, "1.3 is more than its .96"
    assert holds["evaluations", "diversity", "phased_2x2", True] is True, "but farther from the teacher's 1"
    assert holds["evaluations", "motion", "teacher", False] is True
    assert holds["third", "frechet", "phased_2x2", False] is False
    assert holds["third", "frechet", "dmd_sgts", False] is True
    assert holds["third", "motion", "teacher", False] is False
    assert holds["against_longest", "frechet", "dmd_sgts", False] is False
    assert holds["against_longest", "frechet", "phased_2x2", False] is True
    assert verdict_of_recommended({"pictures": "own"}, board_of(), paper) == []


@pytest.mark.usefixtures("_own")
def test_the_boards_rows_are_judged_beside_the_others(tmp_path: Path) -> None:
    path = tmp_path / "paper_claims.json"
    references = rows_of("clips", "teacher_40", TEACHER, lr=None)
    update_json(path, "clips", references, references, {"updates": 100})
    update_board(path, "clips", {"method": "own", "objective": {}, "lr": 1e-3}, board_of())
    update_board(path, "clips", {"method": "own", "objective": {}, "lr": 1e-3}, board_of())  # in place of the first
    write_verdict(tmp_path)
    data = json.loads(path.read_text(encoding="utf-8"))
    assert len(data["leaderboard"]) == len(board_of())
    assert data["recommended"] == [{"teacher": "clips", "method": "own", "objective": {}, "lr": 1e-3}]
    assert {entry["budget"] for entry in data["verdict"]} == {"equal", "evaluations", "third", "against_longest"}
    assert "a third of the network evaluations" in (tmp_path / "verdict.md").read_text(encoding="utf-8")

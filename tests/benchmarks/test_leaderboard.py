"""The leaderboard: what decides is not what is reported, and nothing is trained twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import leaderboard
from benchmarks.claims.common.board import REPORTED, SHARES
from benchmarks.claims.common.evidence import Row
from benchmarks.claims.common.files import write_row
from benchmarks.claims.common.methods import Run
from benchmarks.claims.common.variants import VARIANTS
from benchmarks.claims.embedded.board import EmbeddedBoard
from benchmarks.claims.mixture.board import MixtureBoard
from benchmarks.claims.mixture.training import Settings

TINY = Settings(batch_size=16, width=8, fake_updates=1, initial_updates=20, ema_decay=0.5)
RATES = (1e-3, 3e-3, 1e-2)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MixtureBoard:
    monkeypatch.setattr(MixtureBoard, "lrs", RATES)
    monkeypatch.setattr(MixtureBoard, "baseline_updates", 8)
    return MixtureBoard(tmp_path, "ring", TINY, samples=200)


def test_seeds_that_decide_are_not_reported_and_a_cut_off_board_goes_on(small: MixtureBoard) -> None:
    methods = [VARIANTS["phased_2x2"], VARIANTS["2x1"]]
    work = small.work(methods)
    rows = [next(work) for _ in range(len(RATES) * len(small.selecting))]
    assert {(row.lr, row.seed) for row in rows} == {(lr, seed) for lr in RATES for seed in small.selecting}
    assert small.reported(methods[0]) == []
    work.close()
    rest = list(small.work(methods))
    assert len(rest) == len(REPORTED) + len(RATES) * len(small.selecting) + len(REPORTED)
    assert list(small.work(methods)) == []
    best = small.chosen(methods[0])
    scores = {lr: sum(row.score for row in rows if row.lr == lr) for lr in RATES}
    assert best == min(RATES, key=lambda lr: scores[lr])
    found = small.reported(methods[0])
    assert [(row.seed, row.lr) for row in found] == [(seed, best) for seed in REPORTED]
    assert found[0].extra["refined_8"] != found[0].score
    assert "refined_4" not in found[0].extra
    assert "refined_4" in small.reported(methods[1])[0].extra
    assert found[0].extra["evaluations"] / found[0].updates == pytest.approx(sum(small.cost(methods[0])[:1]), rel=0.2)


def test_learning_rates_are_tried_until_the_best_is_not_at_an_end(
    small: MixtureBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MixtureBoard, "lrs", (1e-8, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1.0))
    monkeypatch.setattr(MixtureBoard, "_measured", lambda board, run, done: measured(run, abs(run.lr - 3e-3)))
    method = VARIANTS["2x1"]
    tried = [row.lr for row in small.work([method])]
    assert tried == [3e-4, 1e-3, 3e-3] * 2 + [1e-2] * 2 + [3e-3] * 5
    assert small.chosen(method) == 3e-3


def measured(run: Run, score: float) -> Row:
    return Row("ring", run.method.key, run.seed, 2, 0.0, 0.0, None, run.lr, run.updates, score)


def test_on_pictures_and_clips_the_guided_teacher_is_two_evaluations(tmp_path: Path) -> None:
    """One rollout of 2.5 evaluations for the fake, 1.5 before the step that trains, six of the fake."""
    for teacher in ("pictures", "clips"):
        board = EmbeddedBoard(tmp_path, teacher)
        assert board.cost(VARIANTS["phased_2x2"]) == (2.5 + 1.5 + 6 + 1 + 2 + 1, 7)
        assert board.updates(VARIANTS["phased_2x2"]) == 120 > board.updates(VARIANTS["2x2_through"]) > 100
        assert board.row(board.runs(VARIANTS["2x1"], board.lrs, [0])[0]) is None


def test_the_report_has_a_line_for_each_variant_that_is_there_best_first(small: MixtureBoard) -> None:
    methods = [VARIANTS["phased_2x2"], VARIANTS["phased_4x1"]]
    list(small.work(methods))
    lines = [line for line in leaderboard.report([small]).splitlines() if line.startswith("| ")]
    scores = {m.title: sum(row.score for row in small.reported(m)) / len(REPORTED) for m in methods}
    titles = [line.split(" | ")[0].removeprefix("| ") for line in lines]
    assert titles[2:] == ["exact samples", *sorted(scores, key=lambda title: scores[title])]
    assert len({len(line.split(" | ")) for line in lines}) == 1


def test_shorter_trainings_say_how_soon_a_goal_is_met(small: MixtureBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        MixtureBoard,
        "_measured",
        lambda board, run, done: replace(
            measured(run, 1 / run.updates), extra={"processor_seconds": 2.0 * run.updates}
        ),
    )
    method = VARIANTS["phased_2x2"]
    rows = list(small.work([method], REPORTED[:2], SHARES))
    assert [row.updates for row in rows[-8:]] == [2, 2, 2, 2, 6, 6, 8, 8] or rows[-1].updates == 8
    assert {row.lr for row in small.reported(method, SHARES[0])} == {small.chosen(method)}
    (header, _, line) = leaderboard.time_to(1 / 6, small)[2].splitlines()
    cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
    assert cells[5:7] == ["12 ± 0", "6"], header
    assert "not reached" in leaderboard.time_to(1 / 100, small)[2]
    whole = rows[-1].updates
    list(small.work([VARIANTS["2x2_step"]], REPORTED[:2], [1.0]))
    ranked = leaderboard.time_to(1 / 6, small)[2].splitlines()[2:]
    assert len(ranked) == 2 and "| 12 ± 0 | 6 |" in ranked[0], "the soonest first"
    assert f"| at most {2 * whole} ± 0 | {whole} |" in ranked[1], "the whole training is a bound"
    for run in small.runs(method, [rows[-1].lr or 0.0], REPORTED[:2], SHARES[2]):  # rows of before times were kept
        write_row(small._path(run), measured(run, 1 / run.updates))
    assert "| not timed | 6 |" in leaderboard.time_to(1 / 6, small)[2]
    assert leaderboard.time_to(1.0, MixtureBoard(small.folder.parent, "grid", TINY)) == []


def test_the_report_leaves_rows_recommendation_and_verdict(small: MixtureBoard, tmp_path: Path) -> None:
    own = VARIANTS[small.recommended]
    list(small.work([own, VARIANTS["phased_2x2"]], REPORTED[:2]))
    leaderboard.write_evidence_of({"ring": small}, tmp_path)
    data = json.loads((tmp_path / "paper_claims.json").read_text(encoding="utf-8"))
    assert [(row["method"], row["seed"], row["share"]) for row in data["leaderboard"]] == [
        (key, seed, 1.0) for key in ("phased_2x2", own.key) for seed in (0, 1)
    ]
    assert data["recommended"] == [
        {"teacher": "ring", "method": own.key, "objective": dict(own.objective), "lr": small.chosen(own)}
    ]
    assert f"{own.title} beats" in (tmp_path / "verdict.md").read_text(encoding="utf-8")


def test_a_report_has_all_teachers_whatever_was_trained(
    small: MixtureBoard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = MixtureBoard(tmp_path, "grid", TINY, samples=200)
    list(other.work([VARIANTS["phased_2x2"]], REPORTED[:1]))
    monkeypatch.setattr(leaderboard, "TEACHERS", ["ring", "grid"])
    monkeypatch.setattr(leaderboard, "make_board", lambda name, *_: {"ring": small, "grid": other}[name])
    page = tmp_path / "pages" / "board.md"
    leaderboard.main(["--teachers", "ring", "--variants", "phased_2x2", "--seeds", "1", "--output", str(page)])
    assert [f"## {board.title}" in page.read_text(encoding="utf-8") for board in (small, other)] == [True, True]
    rows = json.loads((page.parent / "paper_claims.json").read_text(encoding="utf-8"))["leaderboard"]
    assert [row["teacher"] for row in rows] == ["grid", "ring"]


def test_published_rows_stay_where_there_are_none_and_their_rate_is_not_searched_again(
    small: MixtureBoard, tmp_path: Path
) -> None:
    published, other = VARIANTS["phased_2x2"], VARIANTS["2x1"]
    list(small.work([published]))
    rows, lr = small.reported(published), small.chosen(published)
    elsewhere = MixtureBoard(tmp_path / "elsewhere", "ring", TINY, samples=200)
    assert elsewhere.chosen(published) is None
    elsewhere.published = [replace(row, score=9.0, extra={**row.extra, "share": 1.0}) for row in rows]
    assert (elsewhere.chosen(published), elsewhere.chosen(other)) == (lr, None)
    assert [row.score for row in elsewhere.reported(published)] == [9.0] * len(REPORTED)
    assert [(row.seed, row.lr) for row in elsewhere.work([published], REPORTED[:2])] == [(0, lr), (1, lr)]
    assert [row.score for row in elsewhere.reported(published)] == [rows[0].score, rows[1].score, 9.0, 9.0, 9.0]
    elsewhere.published = [replace(row, updates=row.updates + 2) for row in rows]  # of trainings of another length
    assert elsewhere.reported(published) == []


def test_a_report_keeps_the_published_rows_when_it_is_told_to(
    small: MixtureBoard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(small.work([VARIANTS["phased_2x2"]]))
    page = tmp_path / "pages" / "board.md"
    leaderboard.write_evidence_of({"ring": small}, page.parent)
    elsewhere = MixtureBoard(tmp_path / "elsewhere", "ring", TINY, samples=200)
    monkeypatch.setattr(leaderboard, "TEACHERS", ["ring"])
    monkeypatch.setattr(leaderboard, "make_board", lambda *_: elsewhere)
    monkeypatch.setattr(leaderboard, "PUBLISHED", page)
    before = (page.with_name("paper_claims.json")).read_text(encoding="utf-8")
    arguments = ["--teachers", "ring", "--stages", "report", "--output", str(page)]
    leaderboard.main([*arguments, "--published"])
    assert (page.with_name("paper_claims.json")).read_text(encoding="utf-8") == before
    assert VARIANTS["phased_2x2"].title in page.read_text(encoding="utf-8")
    elsewhere.published = ()
    with pytest.raises(SystemExit, match="nothing to report"):
        leaderboard.main(arguments)
    assert (page.with_name("paper_claims.json")).read_text(encoding="utf-8") == before, "and nothing is lost"


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (["--teachers", "clips", "--guidance_scale", "3", "--published"], "--published rows are of the usual guidance"),
        (["--guidance_scale", "3"], "--guidance_scale is of pictures and clips, found "),
        (["--teachers", "clips", "--guidance_scale", "nan"], "expected a number of at least 1, found 'nan'"),
        (["--output", "board.txt"], "expected a file name that ends in .md, found 'board.txt'"),
        (["--seeds", "6"], "invalid choice"),
    ],
)
def test_options_that_cannot_be_are_refused(bad: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        leaderboard.parse(bad)
    assert named in capsys.readouterr().err

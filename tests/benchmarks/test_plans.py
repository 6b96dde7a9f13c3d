"""Plans at two shifts: each is trained once, and the report has their samples in more steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import plans
from benchmarks.claims.common.evidence import Row
from benchmarks.claims.common.methods import Method
from benchmarks.claims.embedded.board import EmbeddedBoard
from benchmarks.claims.mixture.board import MixtureBoard
from benchmarks.claims.mixture.training import Settings


def test_the_report_has_each_plan_at_each_shift_in_more_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MixtureBoard, "lrs", (1e-3, 3e-3, 1e-2))
    monkeypatch.setattr(MixtureBoard, "baseline_updates", 4)
    monkeypatch.setattr(MixtureBoard, "selecting", (100,))
    tiny = Settings(batch_size=16, width=8, fake_updates=1, initial_updates=20, ema_decay=0.5)
    board = MixtureBoard(tmp_path, "ring_5", tiny, samples=200)
    monkeypatch.setattr(plans, "make_board", lambda teacher, work_dir: board)
    monkeypatch.setattr(plans, "TEACHERS", ["ring_5"])
    page = tmp_path / "plans.md"
    command = ["--teachers", "ring_5", "--plans", "2x1", "2_6", "--seeds", "2", "--output", str(page)]
    plans.main([*command, "--work_dir", str(tmp_path), "--stages", "train", "report"])
    tables = page.read_text("utf-8").split("## ")[1:]
    assert [table.splitlines()[0] for table in tables] == [
        "ring of falling weights, shift 3",
        "ring of falling weights, shift 5",
    ]
    for table, shift in zip(tables, (3.0, 5.0), strict=True):
        lines = {cells[1]: cells for cells in (line.split(" | ") for line in table.splitlines() if line[:1] == "|")}
        assert lines["[2, 6]"][3] == lines["[2, 6]"][6] != ""
        assert lines["[2, 6]"][4:6] == ["", ""]
        assert "" not in lines["[1, 1]"] and lines["[1, 1]"][-1] == "2 |"
        method = plans.at_shift(board, plans.PLANS["2x1"], shift)
        assert board.settings.plan(method).shift == pytest.approx(shift)
    monkeypatch.setattr(board, "measure", None)
    plans.main([*command, "--work_dir", str(tmp_path), "--stages", "train"])


def test_on_pictures_more_steps_are_rows_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board, asked = EmbeddedBoard(tmp_path, "pictures"), []

    def row(run: object, steps: int) -> Row:
        asked.append(steps)
        return Row("pictures", "m", 0, steps, 1.0 / steps, 0.0, None, 1e-3, 1, 1.0 / steps, {"agreement": 1.0})

    monkeypatch.setattr(board.study, "row", row)
    monkeypatch.setattr(board.study, "reference_row", lambda name, seed: row(None, int(name[8:])))
    assert plans.refined_experts(board.study) == []
    monkeypatch.setattr(board.study, "has_reference", lambda name, seed: seed == 0)
    *_, table, _ = plans.refined_experts(board.study)
    assert [line.split(" | ")[1] for line in table.splitlines()[2:]] == ["0.2500", "0.1667", "0.1250", "0.0625"]
    asked.clear()
    (run,) = board.runs(Method("2x1", "2 x 1", (1, 1)), [1e-3], [0])
    board.refine(run)
    assert asked == [4, 6, 8, 16]
    assert board.refined(run, 8) is None
    monkeypatch.setattr(board.study, "has_row", lambda run, steps: True)
    assert board.refined(run, 8) == 1 / 8

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu_check import CHECKS, LIMIT, run, table, write


def test_a_check_that_fails_or_takes_too_long_is_a_row() -> None:
    (row,) = run("no such check", "cpu", False, 60)
    assert row["check"] == "no such check" and "invalid choice" in row["failed"]
    for rehearse in (False, True):
        (row,) = run("demo", "cpu", rehearse, 0.01)
        assert row["failed"] == "stopped after 0 s"


def test_what_a_check_found_before_it_failed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: str, rehearse: bool) -> object:
        yield {"what": "a", "seconds": 2.0}
        raise RuntimeError(device)

    monkeypatch.setitem(CHECKS, "demo", (broken, 1))
    found, failed = run("demo", "cpu", True, 60)
    assert found == {"check": "demo", "what": "a", "seconds": 2.0}
    assert failed == {"check": "demo", "what": "", "failed": "RuntimeError: cpu"}


def test_the_page_has_every_row_and_says_what_it_is(tmp_path: Path) -> None:
    rows = [
        {"check": "wan", "what": "x", "seconds": 1.5, "held": 2.0},
        {"check": "demo", "what": "", "failed": "a | b"},
    ]
    write(tmp_path / "docs" / "gpu", rows, "cpu", rehearsed=True)
    text = (tmp_path / "docs" / "gpu.md").read_text()
    assert "no table of a GPU" in text and table(rows) in text
    assert table(rows).splitlines()[2:] == ["| wan | x | 1.5 | 2 |  |  |", "| demo |  |  |  |  | failed: a   b |"]
    assert json.loads((tmp_path / "docs" / "gpu.json").read_text())["rows"] == rows


def test_all_of_it_fits_into_its_time() -> None:
    assert LIMIT <= 8 * 60

"""Reports of the benchmarks that keep their rows in a working folder."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import guided_samples, leaderboard, plans, questions


@pytest.mark.parametrize("benchmark", [guided_samples, leaderboard, plans, questions], ids=lambda one: one.__name__)
def test_no_page_is_written_over_where_there_is_nothing_to_report(benchmark: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "page.md"
    page.parent.mkdir()
    page.write_text("measured", encoding="utf-8")
    with pytest.raises(SystemExit, match="nothing to report: no row of these options is there, run the stage 'train'"):
        benchmark.main(["--stages", "report", "--work_dir", str(tmp_path / "none"), "--output", str(page)])
    assert page.read_text(encoding="utf-8") == "measured" and list(page.parent.iterdir()) == [page]

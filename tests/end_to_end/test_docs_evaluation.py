"""docs/evaluation.md: its commands run in their order, and its tables name what the program knows."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny import save_wan_pipeline
from tests.helpers.tiny_experts import save_experts
from training.evaluation.comparison import METRICS
from training.evaluation.measures import FEATURE_SPACES

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
COMMANDS = [block.replace("\\\n", " ") for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like the root of the repository, with two finished runs in it."""
    for name in ("training", "pdmd_core"):
        (tmp_path / name).symlink_to(ROOT / name)
    teacher = save_wan_pipeline(tmp_path / "teacher")
    for seed, name in enumerate(("demo", "other")):
        save_experts(tmp_path / "runs" / name / "experts", teacher, (16, 16, 1), seed=seed)
    (tmp_path / "prompts.txt").write_text("a panda\n", encoding="utf-8")
    return tmp_path


def test_the_commands_run_and_share_what_was_computed(clone: Path) -> None:
    assert len(COMMANDS) == 3
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        assert program == "python"
        result = subprocess.run([sys.executable, *arguments], cwd=clone, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        if "other=" in command:
            assert "sample other" in result.stderr and "sample teacher" not in result.stderr
    methods = [
        [row["method"] for row in json.loads((clone / "runs" / run / "report.json").read_text("utf-8"))["rows"]]
        for run in ("demo", "compared")
    ]
    assert methods[0][2:] == ["phase experts, 2 steps"] and methods[1][2:] == ["phased", "other"]
    written = {"report.md", "report.json", "report.png", "report", "cache"}
    assert written <= {path.name for path in (clone / "runs" / "demo").iterdir()}


def test_the_tables_name_every_metric_and_every_network() -> None:
    cells = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert cells == [*METRICS, *FEATURE_SPACES]
    for link in re.findall(r"\]\(([^)#]+)", TEXT):
        assert (ROOT / "docs" / link).exists()

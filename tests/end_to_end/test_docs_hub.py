"""docs/hub.md: its code runs from top to bottom against a hub on loopback."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdmd_core.phases import PhasePlan
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.hub import Hub
from tests.helpers.hub_client import Client
from tests.helpers.tiny import lora_roles, save_wan_pipeline, write_lora_experts

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|sh)\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like the root of the repository, with a finished run in it."""
    for name in ("training", "pdmd_core"):
        (tmp_path / name).symlink_to(ROOT / name)
    plan = PhasePlan.from_steps([2, 2], shift=5.0)
    experts = tmp_path / "runs" / "demo" / "experts"
    write_lora_experts(experts, plan, lora_roles(plan), str(save_wan_pipeline(tmp_path / "base")))
    PhasedDMDScheduler.from_plan(plan).save_pretrained(experts / "scheduler")
    return tmp_path


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


def test_all_code_runs_in_order_and_does_what_the_text_says(clone: Path, hub: Hub) -> None:
    assert [language for language, _ in BLOCKS].count("python") == 7
    said = ""
    with Client(hub.url, clone / "home", cwd=clone) as client:
        before = ""
        for language, code in BLOCKS:
            if language == "sh":
                (line,) = code.splitlines()
                program, *arguments = shlex.split(line)
                assert program == "python"
                command = [sys.executable, *arguments]
                subprocess.run(command, cwd=clone, env=client.environment, check=True, capture_output=True)
                continue
            outcome = client.run(before + code)
            assert outcome.error is None, f"{code}\n{outcome.kind}: {outcome.error}"
            said += outcome.said
            before += "".join(line + "\n" for line in code.splitlines() if re.match(r"(import|from) ", line))
    assert f"{hub.url}/user/experts\n" in said and "low_noise" in said
    assert hub.repositories["user/private-experts"].private and not hub.repositories["user/experts"].private
    assert hub.repositories["user/experts"].messages == ["initial commit", "Phased experts"], (
        "equal files are no commit"
    )
    assert set(hub.repositories["user/experts"].branches) == {"main", "trial"}


def test_the_words_of_the_table_are_those_of_the_program() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "pdmd_core" / "experts").rglob("*.py"))
    source = re.sub(r"\{[^{}]*\}", "{}", source.replace("{status}", "403"))
    rows = re.findall(r"^\| ([^|]+) \|", TEXT.partition("## When")[2], re.MULTILINE)[2:]
    assert len(rows) >= 9
    for row in rows:
        for words in re.split(r" \(40\d\)| \.\.\.|phased_experts\.json", row):
            assert words in source, words

"""docs/evidence: its commands are understood, its files are there and say the same."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from benchmarks import guided_samples, leaderboard, plans, questions
from benchmarks.claims.common.evidence import read_evidence, write_evidence
from benchmarks.claims.common.methods import METHODS
from benchmarks.claims.common.summary import write_summary
from benchmarks.claims.common.verdict import write_verdict
from benchmarks.paper_claims import TEACHERS, parse

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence"
README = (EVIDENCE / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_understood(line: str) -> None:
    program, script, *arguments = shlex.split(line, comments=True)
    assert program == "python"
    parsers = {
        "paper_claims": parse,
        "leaderboard": leaderboard.parse,
        "plans": plans.parse,
        "questions": questions.parse,
        "guided_samples": guided_samples.parse,
    }
    parsers[Path(script).stem](arguments)


def test_every_file_that_it_names_is_there() -> None:
    table = README[README.index("| file |") : README.index("## The methods")]
    links = [*re.findall(r"`([\w.]+\.(?:md|json|png|gif))`", table), *re.findall(r"\]\(([^)#:]+)\)", README)]
    assert len(links) > 15
    assert not [link for link in links if not (EVIDENCE / link).exists()]


def test_tables_and_verdict_are_those_of_the_rows(tmp_path: Path) -> None:
    data = read_evidence(EVIDENCE / "paper_claims.json")
    assert sorted(data["settings"]) == sorted(TEACHERS)
    write_evidence(tmp_path / "paper_claims.json", data)
    write_summary(tmp_path)
    write_verdict(tmp_path)
    for name in ("summary.md", "verdict.md", "paper_claims.json"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (EVIDENCE / name).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("script", [questions, guided_samples])
def test_a_page_is_that_of_its_numbers(script: Any) -> None:
    found = json.loads(script.PUBLISHED.read_text(encoding="utf-8"))
    assert script.PUBLISHED.with_suffix(".md").read_text(encoding="utf-8") == script.report(found)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_method_was_run_with_three_seeds(teacher: str) -> None:
    data = read_evidence(EVIDENCE / "paper_claims.json")
    for key in METHODS:
        seeds = [
            row["seed"]
            for row in data["rows"]
            if (row["teacher"], row["method"], row["updates"]) == (teacher, key, data["settings"][teacher]["updates"])
        ]
        assert seeds == [0, 1, 2], key
    text = (EVIDENCE / f"{teacher}.md").read_text(encoding="utf-8")
    assert not [method.title for method in METHODS.values() if f"| {method.title} |" not in text]

"""What the heads of the shipped recipes say was measured is what the reports say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "training" / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def head(recipe: str) -> str:
    """The comment before the first key, in one line."""
    lines = (CONFIGS / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()
    return " ".join(line.removeprefix("# ") for line in lines[: next(i for i, x in enumerate(lines) if x[0] != "#")])


def told(row: dict[str, Any]) -> tuple[str, ...]:
    """The numbers of a row of a report, as texts have them."""
    return f"{row['frechet']:.4g}", f"{row['diversity']:.4g}", f"{100 * row['agreement']:.1f}%"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_says_what_was_measured(recipe: str) -> None:
    assert re.search(r"Measured \(|Not measured with these settings|No measured result", head(recipe))


@pytest.mark.parametrize(
    ("recipe", "report"),
    [
        ("embedded_demo", "docs/demo/report.json"),
        ("embedded_phased", "training/embedded/models/experts/report.json"),
    ],
)
def test_measured_recipes_have_the_numbers_of_their_report(recipe: str, report: str) -> None:
    many, few, experts = json.loads((ROOT / report).read_text(encoding="utf-8"))["rows"]
    for row in (experts, few, many):
        for number in told(row):
            assert number in head(recipe), number


@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        ("embedded_phased_4x1", "Phased DMD, 4 x 1"),
        ("embedded_dmd_sgts", "DMD, four steps with SGTS"),
        ("embedded_dmd_one_step", "DMD, one step"),
    ],
)
def test_the_others_have_those_of_the_evidence(recipe: str, method: str) -> None:
    summary = (ROOT / "docs" / "evidence" / "summary.md").read_text(encoding="utf-8")
    table = (ROOT / "docs" / "evidence" / "pictures.md").read_text(encoding="utf-8")
    frechet, diversity = next(line for line in summary.splitlines() if f"| {method} |" in line).split(" | ")[2:4]
    assert f"FD-Emoji {frechet}, diversity {diversity} of the teacher's" in head(recipe)
    rate = next(line for line in table.splitlines() if f"| {method} |" in line).split(" | ")[2]
    updates = re.search(r"^(\d+) generator updates", table, re.MULTILINE)[1]
    assert f"learning rate {rate} " in head(recipe) and f"with {updates} updates" in head(recipe)

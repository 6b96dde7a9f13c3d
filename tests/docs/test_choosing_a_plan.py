"""docs/choosing-a-plan.md: plans of released files are those of the presets, measured numbers those of the evidence."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdmd_core.phases import PhasePlan
from pdmd_core.presets import PRESETS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "choosing-a-plan.md").read_text(encoding="utf-8")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split(" | ")]


@pytest.mark.parametrize("name", list(PRESETS))
def test_released_files_have_the_plan_that_is_said(name: str) -> None:
    (line,) = [line for line in PAGE.splitlines() if f"`{name}`" in line]
    _, steps, *shift = cells(line)
    plan = PhasePlan.preset(name)
    assert steps == str([len(phase.sigmas) for phase in plan.phases])
    assert [f"{PRESETS[name].shift:.3g}"] == shift if PRESETS[name].shift else shift in ([], [""], ["|"])


def test_numbers_of_plans_are_those_of_the_evidence() -> None:
    """The table rounds nothing that summary.md does not."""
    summary = (DOCS / "evidence" / "summary.md").read_text(encoding="utf-8").splitlines()
    titles = {
        "`[1]`": "DMD, one step",
        "`[4]`": "DMD, four",
        "`[2, 2]`": "Phased DMD, 2 x 2",
        "`[1, 1, 1, 1]`": "Phased DMD, 4",
    }
    table = [cells(line) for line in PAGE[: PAGE.index("## Boundary")].splitlines() if line.startswith("| `[")]
    table = [row for row in table if len(row) == 7]
    assert len(table) == len(titles)
    for plan, pictures, diversity, clips, of_clips, flow, _ in table:
        (own,) = [cells(line) for line in summary if line.startswith(f"| {titles[plan]}")]
        said = [
            pictures.replace(".", "0.", 1).replace("± .", "± 0."),
            f"{diversity} %",
            clips,
            f"{of_clips} %",
            f"{flow} %",
        ]
        assert own[2:] == said


def test_numbers_of_the_mixture_are_those_of_the_plans() -> None:
    plans = (DOCS / "evidence" / "plans.md").read_text(encoding="utf-8").split("\n## ")
    (table,) = [part.splitlines() for part in PAGE.split("\n\n") if part.startswith("| plan | shift 1 | shift 5 |")]
    for place, shift in ((1, 1), (2, 5)):
        (own,) = [part for part in plans if part.startswith(f"ring of falling weights, shift {shift}\n")]
        found = {(row[1], "fake for each" in row[0]): row[3] for row in map(cells, own.splitlines()) if len(row) > 3}
        for plan, *scores in map(cells, table[2:]):
            key = (plan.split("`")[1], "fake for each" in plan)
            assert scores[place - 1] == found.get(key, "not run")


def test_the_shipped_experts_in_more_steps_are_those_of_the_evidence() -> None:
    plans = (DOCS / "evidence" / "plans.md").read_text(encoding="utf-8")
    shipped = [cells(line) for line in plans[plans.index("## The shipped") :].splitlines()[4:]]
    (said,) = [part for part in PAGE.split("\n\n") if part.startswith("| steps | Frechet")]
    assert [cells(line) for line in said.splitlines()[2:]] == [[row[0], row[1], row[3]] for row in shipped]


def test_refined_numbers_are_those_of_the_leaderboard() -> None:
    board = (DOCS / "evidence" / "leaderboard.md").read_text(encoding="utf-8").splitlines()
    titles = {
        "`[2, 2]`": "Phased DMD, 2 x 2 with SGTS",
        "`[2, 2]`, a fake for each step": "2 x 2, a fake for each step",
    }
    part = PAGE[PAGE.index("On the mixture, four-step experts") : PAGE.index("## What released")]
    for line in part.splitlines():
        if (row := cells(line))[0] in titles:
            (own,) = [cells(found) for found in board if found.startswith(f"| {titles[row[0]]} |")][:1]
            assert own[2:5] == row[1:]

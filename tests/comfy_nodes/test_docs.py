"""docs/comfyui.md says what the plans are."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdmd_core.phases import PhasePlan

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/comfyui.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TEXT.splitlines() if line.startswith("|")]
RELEASED = [row for row in ROWS if len(row) == 5 and row[1][0].isdigit()]


def test_there_are_released_files_in_the_table() -> None:
    assert len(RELEASED) >= 5


@pytest.mark.parametrize("row", RELEASED, ids=[row[0][:30] for row in RELEASED])
def test_the_sigmas_of_released_files_are_those_of_their_steps_and_shift(row: list[str]) -> None:
    plan = PhasePlan.from_steps([int(word) for word in row[1].split(",")], float(row[2]))
    assert [float(word) for word in row[3].split(",")] == [round(sigma, 4) for sigma in plan.sigmas]


def test_every_template_is_in_the_table_of_templates() -> None:
    named = {name.strip() for row in ROWS if len(row) == 2 for name in row[0].split(",")}
    assert {
        path.stem.removeprefix("phased_").replace("_", " ") for path in (ROOT / "workflows").glob("*.json")
    } <= named


def test_pictures_are_there() -> None:
    pictures = {path.name for path in (ROOT / "docs/comfyui").glob("*.jpg")}
    assert len(pictures) >= 8 and all(f"(comfyui/{name})" in TEXT for name in pictures)
    written = (ROOT / "tests/helpers/comfyui/write_screenshots.py").read_text(encoding="utf-8")
    kinds = {name.removesuffix(".jpg").removesuffix("_classic").removesuffix("_nodes_2") for name in pictures}
    assert all(kind in written for kind in kinds)

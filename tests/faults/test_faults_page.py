"""docs/faults.md: each fault has a test, and each test named there is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "faults.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
NAME = re.compile(r"`([\w/]+\.py)::(test_\w+)`")


def rows(section: str) -> list[str]:
    """The lines of a section's table below its head."""
    return [line for line in section.splitlines() if line.startswith("|")][2:]


def functions(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_part_of_the_page_is_there() -> None:
    titles = [section.partition("\n")[0] for section in SECTIONS]
    assert titles == [
        *["Training", "Files from outside", "Silent wrongness", "ComfyUI and diffusers under load", "Determinism"],
        *["Supply chain", "Long versions", "What is not noticed"],
    ]
    assert all(len(rows(section)) >= 1 for section in SECTIONS[:-1])


@pytest.mark.parametrize("row", [row for section in SECTIONS for row in rows(section)], ids=lambda row: row[2:50])
def test_every_fault_has_a_test_that_is_there(row: str) -> None:
    named = NAME.findall(row)
    assert named and row.count("::") == len(named), "each fault names its tests as `file.py::test_name`"
    for file, test in named:
        assert test in functions(file), f"{file} has no {test}"

"""docs/models.md: its table is that of the cases, and the tests that it names are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.helpers.families.matrix import BEGIN, COMFYUI, END, PAGE, table

TESTS = Path(__file__).parents[1]


def test_the_table_is_that_of_the_cases() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0] == table(), "python -m tests.helpers.families.matrix"


def test_every_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", PAGE.read_text(encoding="utf-8"))
    assert len(named) == 15 and {file for _, file in COMFYUI.values()} <= {file for file, _ in named}
    for file, test in named:
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (file, test)

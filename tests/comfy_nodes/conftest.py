"""The node pack under another name, as ComfyUI loads it, but without ComfyUI: for the parts that need none."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAME = "/base/custom_nodes/phased-dmd"


@pytest.fixture(scope="session")
def part() -> Callable[[str], ModuleType]:
    """``part("widget_text")`` is the module ``comfy_nodes.widget_text`` of the pack."""
    spec = importlib.util.spec_from_file_location(NAME, ROOT / "__init__.py")
    assert spec and spec.loader
    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])
    return lambda name: importlib.import_module(f"{NAME}.comfy_nodes.{name}")

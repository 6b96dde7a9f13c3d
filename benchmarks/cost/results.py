"""Where a benchmark leaves what it found: the numbers as JSON, and a page of them beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_result(path: Path, result: Mapping[str, Any], page: str) -> None:
    """Write ``<path>.json`` and ``<path>.md``, whatever suffix the path has; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(page.rstrip("\n") + "\n", encoding="utf-8")

"""Files of a run with one JSON object a line, each about an update."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """JsonLines are added at the end; those of updates that are done again are dropped first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cut = False
        """Whether the last line may have been written in part."""

    def start(self, update: int) -> None:
        """The run goes on after this update: keep no lines of later ones, nor a line that was cut off."""
        kept = [line for line in self.read() if line["update"] <= update]
        if self.path.exists():
            part = self.path.with_name(f".{self.path.name}.part")
            part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            part.replace(self.path)

    def add(self, values: Mapping[str, Any]) -> None:
        """One more line; its key ``update`` says which update it is about."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text, self._cut = ("\n" if self._cut else "") + json.dumps(values) + "\n", True
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
        self._cut = False

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; none when there is no file."""
        if not self.path.exists():
            return []
        lines = map(_values, self.path.read_text(encoding="utf-8").splitlines(keepends=True))
        return [line for line in lines if line is not None]


def _values(line: str) -> dict[str, Any] | None:
    """What a line holds; None for one that was cut off."""
    try:
        values = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def monitoring_log(run: Path, name: str) -> JsonLines:
    """What monitors keep of a run: performance, validations, warnings."""
    return JsonLines(run / "watch" / f"{name}.jsonl")

"""Files of a run with one JSON object a line, each about an update."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Lines:
    """Lines are added at the end; those of updates that are done again are dropped first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, update: int) -> None:
        """The run goes on after this update: keep no lines of later ones, nor a line that was cut off."""
        kept = [line for line in self.read() if line["update"] <= update]
        if self.path.exists():
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def add(self, values: Mapping[str, Any]) -> None:
        """One more line; its key ``update`` says which update it is about."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; none when there is no file."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


def lines_of(run: Path, name: str) -> Lines:
    """What watchers keep of a run: performance, validations, warnings."""
    return Lines(run / "watch" / f"{name}.jsonl")

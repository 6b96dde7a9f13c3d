"""A tiny distillation as a program: what it writes, and what of that must be the same however it went."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pdmd_core.experts import ExpertsError, PhasedExperts
from tests.helpers.faults.programs import Ended, Running, Warm
from training.loop.checkpoints import list_checkpoints
from training.loop.digests import find_damage

LORA = {"kind": "lora", "rank": 4, "alpha": 4, "lr": 1e-2}
SETTINGS: dict[str, Any] = {
    "plan": {"steps": [1, 1], "shift": 3.0},
    "objective": {"guidance_scale": 2.0},
    "generator": LORA,
    "fake": LORA,
    "updates": 3,
    "batch_size": 2,
    "fake_updates": 1,
    "ema_decay": 0.9,
    "lr_decay_share": 0.5,
    "checkpoints": {"every": 2, "keep": 2},
    "validation": {"every": 3, "seeds": 1, "teacher_steps": 2},
    "monitoring": {"tracker": None, "log_every": 1, "page": False},
}
"""Six updates in two phases; checkpoints after 2, 3, 4 and 6, samples after 0, 3 and 6."""
RESULTS = (
    "metrics.jsonl",
    "experts*/*.safetensors",
    "experts*/*.json",
    "experts*/scheduler/*",
    "samples/*",
    "watch/v*",
)
EXPERTS = ("high_noise", "low_noise")


@dataclass(frozen=True)
class Distillation:
    """One output folder. ``settings`` of its configuration file may be changed between starts."""

    warm: Warm
    folder: Path
    settings: dict[str, Any]

    def start(
        self, *arguments: str, faults: Sequence[Mapping[str, Any]] = (), environment: Mapping[str, str] | None = None
    ) -> Running:
        return self.warm.start("distill", *self.command(*arguments), faults=faults, environment=environment)

    def run(self, *arguments: str, faults: Sequence[Mapping[str, Any]] = ()) -> Ended:
        return self.start(*arguments, faults=faults).wait()

    def command(self, *arguments: str) -> list[str]:
        """Of distill.py; writes the configuration."""
        path = self.folder.with_name(f"{self.folder.name}.yaml")
        path.write_text(yaml.safe_dump(self.settings), encoding="utf-8")
        return ["--config", str(path), "--output_dir", str(self.folder), *arguments]

    def at(self, change: str, action: str, number: int = 1, log: Path | None = None) -> dict[str, Any]:
        """A fault at a change to the output folder."""
        fault = {"name": "at_change", "folder": str(self.folder), "change": change, "action": action, "number": number}
        return fault | ({"log": str(log)} if log else {})

    @property
    def checkpoints(self) -> list[str]:
        return [path.name for path in list_checkpoints(self.folder / "checkpoints")]

    def updates(self) -> int:
        """Updates that metrics.jsonl has so far."""
        path = self.folder / "metrics.jsonl"
        return path.read_text("utf-8").count("\n") if path.exists() else 0

    def results(self) -> dict[str, bytes]:
        """Content of the files that neither time nor interruption may change."""
        paths = [path for pattern in RESULTS for path in sorted(self.folder.glob(pattern))]
        found = {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}
        if metrics := found.get("metrics.jsonl"):
            found["metrics.jsonl"] = re.sub(rb', "time": [0-9.]+', b"", metrics)
        return found

    def check_nothing_half_written_counts(self) -> None:
        """Every checkpoint that is listed is whole, and experts are those of a manifest or none."""
        for checkpoint in list_checkpoints(self.folder / "checkpoints"):
            assert find_damage(checkpoint) is None, checkpoint
        try:
            experts = PhasedExperts.open(self.folder / "experts")
        except ExpertsError:
            return
        for name in EXPERTS:
            experts.verify(name)

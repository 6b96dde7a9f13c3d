"""What networks compute in an update is what the dry run announces, on any number of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pdmd_core.evaluations import evaluations_per_update
from pdmd_core.method import Objective
from pdmd_core.phases import PhasePlan

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def counted() -> list[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = ROOT / "tests" / "helpers" / "counted_evaluations.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_a_teacher_of_two_networks_in_shards_computes_nothing_for_nothing(counted: list[dict[str, Any]]) -> None:
    counts = evaluations_per_update(PhasePlan.from_steps([1, 1], 5.0), 1, Objective(), fake_updates=2, fake_draws=1)
    samples = 8 * 4  # of all updates
    backwards = counts["fake"] + counts["generator"]
    forwards = sum(counts.values()) + counts["teacher"]  # guidance is of twice the batch
    assert len(counted) == 6
    for found in counted:
        assert found["passes"] == [forwards * samples, backwards * samples], found["processes"]


def test_the_numbers_are_the_same_however_many_processes_share_them(counted: list[dict[str, Any]]) -> None:
    for groups in (1, 2):
        first, *others = [found["values"] for found in counted if found["groups"] == groups]
        for other in others:
            for values, wanted in zip(other, first, strict=True):
                assert values == pytest.approx(wanted, rel=1e-4)

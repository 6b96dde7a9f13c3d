"""A flipped bit in any file of a run's folder that decides numbers is never silent."""

from __future__ import annotations

import shutil
from pathlib import Path

from pdmd_core.experts import ExpertsError, PhasedExperts
from tests.faults.conftest import Uninterrupted
from training.data.prompt_cache import examined
from training.loop.digests import find_damage

POSITIONS = 8
"""In each file, from its first byte to its last."""


def flipped(path: Path) -> list[bytes]:
    """Copies of a file, each with one other bit."""
    found = []
    for number in range(POSITIONS):
        data = bytearray(path.read_bytes())
        data[number * (len(data) - 1) // (POSITIONS - 1)] ^= 1 << number
        found.append(bytes(data))
    return found


def is_noticed(path: Path, run: Path) -> bool:
    """Whether what reads this file when a run goes on, or when its experts are sampled, refuses it."""
    if path.is_relative_to(run / "checkpoints"):
        return find_damage(path.parent) is not None
    if path.is_relative_to(run / "cache"):
        return examined(path.parent).get(path.name) is not None
    try:
        PhasedExperts.open(path.parent).verify(path.stem)
    except ExpertsError:
        return True
    return False


def test_a_flipped_bit_is_noticed_wherever_it_is(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted.run.folder, run)
    files = [*run.glob("checkpoints/update-00000006/*"), *run.glob("checkpoints/update-00000006/.metadata")]
    files += [*run.glob("cache/*/*"), *run.glob("experts*/*.safetensors")]
    silent, count = [], 0
    for path in sorted(set(files)):
        before = path.read_bytes()
        assert not is_noticed(path, run), path
        for data in flipped(path):
            path.write_bytes(data)
            count += 1
            silent += [] if is_noticed(path, run) else [path]
        path.write_bytes(before)
    assert not silent
    assert count >= 60

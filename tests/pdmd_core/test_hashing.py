"""SHA-256 of a file: read once as long as it is the same file."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pdmd_core.hashing import sha256_of


def in_place(path: Path) -> None:
    path.write_bytes(b"two")


def with_its_old_date(path: Path) -> None:
    status = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced(path: Path) -> None:
    other, status = path.with_name("other"), path.stat()
    other.write_bytes(b"two")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


def test_a_new_file_is_read_each_time(tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two changes within a tick of the system's clock have one date."""
    monkeypatch.setattr("pdmd_core.hashing.SETTLED", 2.0)
    path = tmp_path / "f"
    for content in (b"one", b"two", b"six"):
        path.write_bytes(content)
        assert sha256_of(path) == hashlib.sha256(content).hexdigest()
    assert hashed == ["f"] * 3


@pytest.mark.parametrize("change", [in_place, with_its_old_date, replaced])
def test_a_file_is_read_once_until_it_changes(
    change: Callable[[Path], None], tmp_path: Path, hashed: list[str]
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"one")
    assert sha256_of(path) == sha256_of(path) == hashlib.sha256(b"one").hexdigest()
    assert hashed == ["f"]
    time.sleep(0.1)  # the dates of files go on in ticks
    change(path)
    assert sha256_of(path) == hashlib.sha256(b"two").hexdigest()
    assert hashed == ["f"] * 2

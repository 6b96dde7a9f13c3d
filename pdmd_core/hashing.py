"""SHA-256 of files and of plain data, from the standard library alone."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

SETTLED = 2.0
"""Seconds since a file's last change after which another change cannot have the same date, on any file system."""

_State = tuple[int, ...]
_digests: dict[str, tuple[_State, str]] = {}
"""Of the files that this process has read: their state then, and their digest."""


def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a file, which is read once in a process.

    It is read again when its size, dates, inode or device are others than they were, and when it was so new that a
    change might not show in them.

    Args:
        path: The file.

    Returns:
        64 hexadecimal digits.

    Raises:
        OSError: If the file cannot be read.
    """
    with path.open("rb") as file:
        state = _state(file.fileno())
        known = _digests.get(str(path))
        if known is not None and known[0] == state:
            return known[1]
        started = time.time_ns()
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if _state(file.fileno()) == state and started - max(state[:2]) >= SETTLED * 1e9:
            _digests[str(path)] = state, digest
    return digest


def _state(descriptor: int) -> _State:
    """What changes when a file does: its dates in nanoseconds first."""
    status = os.fstat(descriptor)
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev


def sha256_of_bytes(content: bytes) -> str:
    """Compute the SHA-256 of bytes.

    Args:
        content: The bytes.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(content).hexdigest()


def digest_of(*parts: object, length: int = 24) -> str:
    """Compute a digest of plain data: equal data has equal digests.

    Args:
        *parts: Anything that JSON holds; the keys of dictionaries are sorted.
        length: The number of digits, at most 64.

    Returns:
        The first hexadecimal digits of the SHA-256.
    """
    return sha256_of_bytes(json.dumps(parts, sort_keys=True).encode())[:length]

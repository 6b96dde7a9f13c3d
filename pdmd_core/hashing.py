"""SHA-256 of files and of plain data. (Standard library only.)"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_bytes(content: bytes) -> str:
    """Hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def digest_of(*parts: object, length: int = 24) -> str:
    """The first digits of the SHA-256 of plain data, as JSON with sorted keys: equal data has equal digests."""
    return sha256_of_bytes(json.dumps(parts, sort_keys=True).encode())[:length]

"""SHA-256 of files and of plain data, from the standard library alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a file.

    Args:
        path: The file.

    Returns:
        64 hexadecimal digits.

    Raises:
        OSError: If the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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

"""SHA-256 of the files in a folder, kept beside them: damage is seen before anything is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch.distributed as dist

from pdmd_core.hashing import sha256_of

NAME = "sha256.json"


def write_digests(folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Write ``sha256.json``, the last file of a folder. All processes do it together and divide the reading.

    Args:
        folder: The folder, whose other files are all there.
        group: Over what processes tell each other; the default group when None.

    Raises:
        OSError: If it cannot be written.
    """
    found = digests_of(folder, group)
    if not dist.is_initialized() or dist.get_rank() == 0:
        with (folder / NAME).open("w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
            file.flush()
            os.fsync(file.fileno())


def find_damage(folder: Path) -> str | None:
    """Compare the files of a folder with their ``sha256.json``. All processes do it together.

    Args:
        folder: The folder.

    Returns:
        What is wrong with one of its files; None if all are what was written.
    """
    found = digests_of(folder)
    try:
        expected = json.loads((folder / NAME).read_text(encoding="utf-8"))
        changed = sorted(name for name in expected if expected[name] != found.get(name))
    except (OSError, ValueError, TypeError):
        return f"{NAME} is missing or damaged"
    if not changed:
        return None
    return f"{changed[0]} is {'not what was written' if changed[0] in found else 'missing'}"


def digests_of(folder: Path, group: dist.ProcessGroup | None = None) -> dict[str, str]:
    """Compute the SHA-256 of the files of a folder. All processes do it together.

    Args:
        folder: The folder.
        group: Over what processes tell each other; the default group when None.

    Returns:
        File name to SHA-256, but for ``sha256.json`` and for files that cannot be read.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != NAME)
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parts: list[dict[str, str]] = [{} for _ in range(processes)]
    parts[rank] = {path.name: digest for path in files[rank::processes] if (digest := _digest(path))}
    if processes > 1:
        dist.all_gather_object(parts, parts[rank], group=group)
    return {name: digest for part in parts for name, digest in part.items()}


def _digest(path: Path) -> str | None:
    try:
        return sha256_of(path)
    except OSError:  # of a disk that fails
        return None

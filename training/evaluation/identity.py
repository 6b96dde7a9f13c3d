"""What samples depend on, as short hashes: two runs with equal hashes give equal samples."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdmd_core.experts import Manifest
from pdmd_core.hashing import digest_of, sha256_of, sha256_of_bytes

if TYPE_CHECKING:  # they import diffusers, and --help needs this module
    from training.data.examples import Example
    from training.data.teacher import TeacherSource


class FileHashes:
    """SHA-256 of files; those that have neither a new size nor a new date are not read again by a later run.

    Args:
        memory: The JSON file that holds what is known.
    """

    def __init__(self, memory: Path) -> None:
        self.memory = memory
        try:
            self._known: dict[str, Any] = dict(json.loads(memory.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            self._known = {}

    def __call__(self, path: Path) -> str:
        """Hash a file, or remember its hash."""
        status, name = path.stat(), str(path.resolve())
        state = [status.st_size, status.st_mtime_ns]
        known = self._known.get(name)
        if not (isinstance(known, list) and known[:2] == state):
            self._known[name] = known = [*state, sha256_of(path)]
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            self.memory.write_text(json.dumps(self._known, indent=1), encoding="utf-8")
        return str(known[2])

    def of_folder(self, folder: Path, files: Iterable[Path] | None = None) -> str:
        """Hash names and contents of files.

        Args:
            folder: What names are relative to.
            files: Files in it; all of them when None.
        """
        chosen = sorted(path for path in (folder.rglob("*") if files is None else files) if path.is_file())
        return digest_of([(path.relative_to(folder).as_posix(), self(path)) for path in chosen])


def teacher_identity(source: TeacherSource, hashes: FileHashes) -> str:
    """Hash a teacher's weights and configuration: a folder is its content, a Hub id its commit.

    Args:
        source: Where the teacher is.
        hashes: Remembers the hashes of weight files.

    Raises:
        TeacherError: When there is no such teacher.
    """
    index, folder = source.index(), Path(source.path)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source.path, "model_index.json", revision=source.revision)
        commit = Path(cached).parent.name if isinstance(cached, str) else source.revision
        return digest_of(source.path, commit, source.pipeline)
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0] and name != "scheduler"]
    files = [folder / "model_index.json", *(file for part in parts for file in (folder / part).rglob("*"))]
    return digest_of(hashes.of_folder(folder, files), source.pipeline)


def experts_identity(manifest: Manifest) -> str:
    """Hash the experts' weights and plan."""
    return digest_of([asdict(expert) for expert in manifest.experts], manifest.plan.to_dict())


def example_identity(example: Example, hashes: FileHashes) -> str:
    """Hash a prompt and the content of its images."""
    images = [example.image] + ([] if example.last_image is None else [example.last_image])
    found = [sha256_of_bytes(i) if isinstance(i, bytes) else hashes(i) if i else None for i in images]
    return digest_of(example.prompt, *found)

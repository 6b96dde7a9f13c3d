"""A folder that appears complete or not at all."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import ExpertsError
from ..format.manifest import MANIFEST_NAME


def check_output(output: Path, overwrite: bool, sources: Sequence[Path], nbytes: int = 0) -> None:
    """Refuse, before any work, an output that would destroy something or that does not fit on the disk.

    Args:
        output: The folder to write.
        overwrite: Whether an output that is there may be replaced.
        sources: Folders that are read, none of which may be written into.
        nbytes: About how many bytes will be written.

    Raises:
        ExpertsError: If the output exists without ``overwrite``, is no folder of experts or of a pipeline, overlaps a
            source, or does not fit.
    """
    target = output.resolve()
    for source in sources:
        origin = source.resolve()
        if target == origin or origin in target.parents or target in origin.parents:
            raise ExpertsError(f"--output {output} is, holds or lies in {source}, which is read: choose another folder")
    if output.exists() and not overwrite:
        raise ExpertsError(f"--output {output} exists: choose another folder, or replace it with --overwrite")
    if output.exists() and not _ours(output):
        raise ExpertsError(
            f"--output {output} is not a folder of experts or of a pipeline, so --overwrite leaves it alone: choose "
            "another folder"
        )
    parent = next(folder for folder in target.parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if nbytes > free:
        raise ExpertsError(f"--output {output} takes {in_units(nbytes)}, {in_units(free)} are free: make room")


def _ours(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    return bool({MANIFEST_NAME, "model_index.json"} & set(names)) or all(n.endswith(".safetensors") for n in names)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Make a folder to write into that takes its name when the block ends, replacing what is there.

    After an error nothing of it stays, and what was there is untouched.

    Args:
        output: The name that the folder takes.

    Yields:
        The folder to write into.

    Raises:
        ExpertsError: If the disk is full or cannot be written.
    """
    staging: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        new = staging / "new"
        new.mkdir()
        yield new
        if output.exists():
            output.rename(staging / "old")
        try:
            new.rename(output)
        except OSError:
            if (staging / "old").exists():
                (staging / "old").rename(output)
            raise
    except OSError as error:
        full = ": make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        reason = " ".join(str(error).split())
        raise ExpertsError(f"cannot write {output} ({reason}), nothing was changed{full}") from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def in_units(nbytes: int) -> str:
    """Write a size in the largest unit that fits: 1,500,000 bytes are ``1.5 MB``.

    Args:
        nbytes: The number of bytes.

    Returns:
        The size with its unit.
    """
    size, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"

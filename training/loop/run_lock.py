"""The lock on the output folder of a run: it can be written, holds one run, and is used by one process at a time."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from training.config.command_line import UserError
from training.loop.checkpoints import list_checkpoints


class OutputFolderError(UserError):
    """An output folder that cannot be used: one line."""


@contextmanager
def lock_output_dir(output_dir: Path, resume: bool) -> Iterator[None]:
    """Keep every other process out of an output folder within the block. Only the first process of a run locks.

    The operating system releases the lock when this process ends, however it ends.

    Args:
        output_dir: The folder, which is made when it is not there.
        resume: Whether the run goes on from a checkpoint of the folder.

    Yields:
        Nothing.

    Raises:
        OutputFolderError: If another process has the lock, if the folder cannot be written, or if it holds the
            checkpoints of a run that is not resumed.
    """
    checkpoints = output_dir / "checkpoints"
    owner = checkpoints / ".owner"
    lock = FileLock(checkpoints / ".lock", timeout=0)
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except Timeout:
        raise OutputFolderError(
            f"{output_dir}: in use by {_name_of(owner)}; wait for its end, stop it, or choose another output_dir"
        ) from None
    except OSError as error:
        lock.release()
        raise OutputFolderError(
            f"{output_dir}: cannot be written ({error.strerror}); make room, change its permissions or choose another "
            "output_dir"
        ) from None
    try:
        kept = list_checkpoints(checkpoints)
        if kept and not resume:
            raise OutputFolderError(
                f"{output_dir}: holds a run with checkpoints up to {kept[-1].name}; go on with --resume, choose "
                f"another output_dir, or remove {checkpoints} to start anew"
            )
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _name_of(owner: Path) -> str:
    try:
        return owner.read_text(encoding="utf-8")
    except OSError:  # it has the lock and is about to write its name
        return "another process"

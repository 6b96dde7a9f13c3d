"""The folder of a run: one that can be written, of one run, and of one process at a time."""

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
def claimed(folder: Path, resume: bool) -> Iterator[None]:
    """No other process gets this folder inside. Only the first process of a run claims. Raises OutputFolderError.

    The system releases the lock when this process ends, however it ends.
    """
    checkpoints = folder / "checkpoints"
    owner = checkpoints / ".owner"
    lock = FileLock(checkpoints / ".lock", timeout=0)
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except Timeout:
        raise OutputFolderError(
            f"{folder}: in use by {_read(owner)}; wait for its end, stop it, or choose another output_dir"
        ) from None
    except OSError as error:
        lock.release()
        raise OutputFolderError(
            f"{folder}: cannot be written ({error.strerror}); make room, change its permissions or choose another "
            "output_dir"
        ) from None
    try:
        kept = list_checkpoints(checkpoints)
        if kept and not resume:
            raise OutputFolderError(
                f"{folder}: holds a run with checkpoints up to {kept[-1].name}; go on with --resume, choose another "
                f"output_dir, or remove {checkpoints} to start anew"
            )
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _read(owner: Path) -> str:
    try:
        return owner.read_text(encoding="utf-8")
    except OSError:  # it is about to write it
        return "another process"

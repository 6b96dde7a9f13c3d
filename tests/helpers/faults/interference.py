"""Faults inside a program, at one of the changes that it makes to a folder: Python tells of each before it is made.

A change is one line: ``write metrics.jsonl``, ``replace experts/.a.part experts/a``, ``remove ...``, ``mkdir ...``,
``rmdir ...``, with paths relative to the folder.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHANGES = {"os.rename": "replace", "os.remove": "remove", "os.mkdir": "mkdir", "os.rmdir": "rmdir"}
FOREVER = 3600
LARGEST = 8192
"""Bytes: more than what a tiny run prints, less than a checkpoint and an expert."""


def interfere(faults: Sequence[dict[str, Any]]) -> None:
    """Have these happen to this process; each is ``{"name": name of a function here, ...its arguments}``."""
    for fault in faults:
        arguments = {key: value for key, value in fault.items() if key != "name"}
        {f.__name__: f for f in (at_change, largest_file, on_process)}[fault["name"]](**arguments)


def at_change(folder: str, action: str, change: str = "", number: int = 1, log: str | None = None) -> None:
    """Before the ``number``-th change to the folder that the pattern ``change`` finds.

    action: the name of a signal that this process gets; ``pause`` for good; the name of an error (``ENOSPC``), which
    this change and all later ones of the pattern then end with; ``EFBIG``, which is the kernel's own, in the middle of
    every write beyond ``LARGEST`` bytes of a file from then on; or ``none``. log: where all changes are written.
    """
    root, pattern = Path(os.path.realpath(folder)), re.compile(change)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else None
    count, within = 0, threading.local()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if getattr(within, "hook", False) or not (event == "open" or event in CHANGES):
            return
        within.hook = True  # of this thread alone: another may write a checkpoint meanwhile
        try:
            described = _change(event, arguments, root)
            if described is None:
                return
            if file is not None:
                os.write(file, f"{described}\n".encode())
            if pattern.search(described):
                count += 1
                if count >= number:
                    _act(action, described, count == number)
        finally:
            within.hook = False

    sys.addaudithook(hook)


def _change(event: str, arguments: tuple[Any, ...], root: Path) -> str | None:
    """What is about to be changed; None for what changes nothing in the folder."""
    if event == "open":
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or any(letter in str(mode or "") for letter in "wax+")
        places = [_place(path, -1, root)] if writes else [None]
    elif event == "os.rename":
        places = [_place(arguments[0], arguments[2], root), _place(arguments[1], arguments[3], root)]
    else:
        places = [_place(arguments[0], arguments[-1], root)]
    return None if None in places else " ".join([CHANGES.get(event, "write"), *map(str, places)])


def _place(path: Any, folder: int, root: Path) -> Path | None:
    if not isinstance(path, str | bytes | os.PathLike):
        return None
    name = Path(os.fsdecode(path))
    if folder != -1:
        name = Path(f"/proc/self/fd/{folder}").readlink() / name
    place = name.parent.resolve() / name.name
    return place.relative_to(root) if place.is_relative_to(root) else None


def _act(action: str, described: str, first: bool) -> None:
    if action.startswith("SIG"):
        if first:
            os.kill(os.getpid(), getattr(signal, action))
    elif action == "pause":
        time.sleep(FOREVER)
    elif action == "EFBIG":
        largest_file(LARGEST, kill=False)
    elif action != "none":
        number = getattr(errno, action)
        raise OSError(number, os.strerror(number), described)


def largest_file(size: int, kill: bool = True) -> None:
    """The kernel ends the write that would make a file larger than this in its middle, and kills this process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)


def on_process(patch: str, rank: int = 0) -> None:
    """Call ``patch``, a function of tests/helpers/faults/patches.py, in the process of this rank."""
    if int(os.environ.get("RANK", "0")) == rank:
        from tests.helpers.faults import patches

        getattr(patches, patch)()

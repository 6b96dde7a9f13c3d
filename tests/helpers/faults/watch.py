"""What a piece of code opens, starts, loads or runs: Python's own audit events."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CODE = ("exec", "compile", "import")
"""Events of running code."""
OUTSIDE = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.dlopen", "pickle.", "marshal.", "tempfile.", "urllib.")
"""Starts of events that touch anything but an open file."""
_current: list[list[str]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _current:
        return
    if event == "open":
        path, mode, flags = arguments
        place = os.path.realpath(path) if isinstance(path, str | bytes | os.PathLike) else repr(path)
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or any(letter in str(mode or "") for letter in "wax+")
        _current[-1].append(f"{'write' if writes else 'read'} {place}")
    elif event in CODE or event.startswith(OUTSIDE):
        _current[-1].append(f"{event} {arguments!r:.200}")


sys.addaudithook(_hook)  # once: hooks stay until the interpreter ends


@contextmanager
def only_reads(folder: Path) -> Iterator[None]:
    """The block opens files inside ``folder`` for reading and does nothing else that reaches outside the program."""
    seen: list[str] = []
    _current.append(seen)
    try:
        yield
    finally:
        _current.pop()
    inside = f"read {os.path.realpath(folder)}{os.sep}"
    strange = [event for event in seen if not event.startswith(inside)]
    assert not strange, strange

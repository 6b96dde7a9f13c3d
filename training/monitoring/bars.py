"""Progress as a bar on a terminal, and elsewhere (a log file, a cluster) as lines with time, rate and time left."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from datetime import datetime
from typing import IO, Any

from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES = 30.0


class Lines:
    """A file for tqdm that is no terminal: what would be written over the line before is a line of its own.

    Args:
        file: Where the lines go.
    """

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, text: str) -> int:
        """Write a state of the bar as a line with the time of day."""
        if line := text.strip("\r\n "):
            self.file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")
        return len(text)

    def flush(self) -> None:
        """Write what is held back."""
        self.file.flush()


def progress_bar(items: Iterable[Any] | None = None, **settings: Any) -> tqdm[Any]:
    """Show progress on standard error.

    Args:
        items: What is iterated; None for a bar that is told by ``update``.
        **settings: As tqdm takes them.

    Returns:
        The bar of tqdm. Outside a terminal it writes a line every half a minute, without carriage returns.
    """
    if not sys.stderr.isatty():
        settings = {
            "mininterval": SECONDS_BETWEEN_LINES,
            "maxinterval": SECONDS_BETWEEN_LINES,
            "bar_format": "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}{postfix}, {elapsed} passed, {remaining} left",
            "file": Lines(sys.stderr),
            **settings,
        }
    return tqdm(items, **settings)

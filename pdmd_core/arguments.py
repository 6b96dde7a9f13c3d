"""What the commands share of argparse: every mistake is one line that says what was expected and what was found.

(Standard library only.)
"""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class CommandParser(argparse.ArgumentParser):
    """An argument parser that ends with one line, and takes options by their whole names only.

    Args:
        takes_others: Whether ``parse_known_args`` returns arguments that are not known, instead of refusing them.
        **settings: Those of ``argparse.ArgumentParser``. Texts of the help keep their line breaks.
    """

    def __init__(self, takes_others: bool = False, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)
        self.takes_others = takes_others

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse arguments; an unknown option is refused with the nearest one, where a subcommand knows its own.

        Args:
            args: The arguments; None takes those of the process.
            namespace: Where options are put; None makes a new one.

        Returns:
            The options, and the arguments that are not known.
        """
        options, rest = super().parse_known_args(args, namespace)
        if rest and not self.takes_others:
            self.error(self.unknown(rest[0]))
        return options, rest

    def unknown(self, found: str) -> str:
        """Write the line about an unknown argument, with the nearest option where it looks like one.

        Args:
            found: The argument.

        Returns:
            The line.
        """
        if not found.startswith("-"):
            return f"unexpected argument {found!r}"
        name = found.partition("=")[0]
        known = {option.strip("-"): option for option in self._option_string_actions}
        near = difflib.get_close_matches(name.strip("-"), list(known), n=1)
        return f"unknown option {name}" + (f", did you mean {known[near[0]]}?" if near else "")

    def error(self, message: str) -> NoReturn:
        """Print one line on standard error and end with exit status 2.

        Args:
            message: What is wrong.
        """
        line = " ".join(message.removeprefix("argument ").split())
        print(f"{self.prog}: {line} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


# --- types of arguments ------------------------------------------------------------


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Make the type of an option that is a whole number in a range, its ends included.

    Args:
        least: The least value.
        most: The largest value; None sets no limit.

    Returns:
        A function for ``type=`` of ``add_argument``.
    """
    limits = f"of at least {least}" if most is None else f"from {least} to {most}"

    def parse(given: str) -> int:
        try:
            value = int(given)
        except ValueError:
            value = None
        if value is None or value < least or (most is not None and value > most):
            raise _expected(f"a whole number {limits}", given)
        return value

    return parse


COUNT = whole_number(1)
"""The type of an option that is a number of things of which there is at least one."""
LENGTH = whole_number(1, 2**14)
"""The type of an option that counts pixels, frames or tokens of a sample; a manifest takes no larger ones either."""
SEED = whole_number(0, 2**63 - 1)
"""The type of an option that is a seed of a random number generator."""


def number(least: float, above: bool = False) -> Callable[[str], float]:
    """Make the type of an option that is a finite number.

    Args:
        least: The least value.
        above: Whether ``least`` itself is refused.

    Returns:
        A function for ``type=`` of ``add_argument``.
    """

    def parse(given: str) -> float:
        try:
            value = float(given)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or (above and value == least):
            raise _expected(f"a number {'above' if above else 'of at least'} {least:g}", given)
        return value

    return parse


def text(given: str) -> str:
    """Read an option that is a text with something in it.

    Args:
        given: What the user typed.

    Returns:
        The text.

    Raises:
        ArgumentTypeError: If the text is empty.
    """
    if not given.strip():
        raise _expected("some text", given)
    return given


def path(given: str) -> Path:
    """Read an option that is a path; Python itself takes the empty path for the current folder.

    Args:
        given: What the user typed.

    Returns:
        The path.

    Raises:
        ArgumentTypeError: If the text is empty.
    """
    if not given.strip():
        raise _expected("a path", given)
    return Path(given)


def output_folder(given: str) -> Path:
    """Read an option that is a folder to write, which need not exist.

    Args:
        given: What the user typed.

    Returns:
        The folder.

    Raises:
        ArgumentTypeError: If a file stands in its way.
    """
    folder = path(given)
    if (file := _file_above(folder)) is not None:
        raise argparse.ArgumentTypeError(f"expected a folder to write, found {given!r}, and {file} is a file")
    return folder


def output_file(*suffixes: str) -> Callable[[str], Path]:
    """Make the type of an option that is a file to write.

    Args:
        *suffixes: What its name may end in, such as ``.json``.

    Returns:
        A function for ``type=`` of ``add_argument``.
    """

    def parse(given: str) -> Path:
        file = path(given)
        if file.suffix.lower() not in suffixes or file.is_dir():
            raise _expected(f"a file name that ends in {' or '.join(suffixes)}", given)
        if (above := _file_above(file.parent)) is not None:
            raise argparse.ArgumentTypeError(f"expected a file to write, found {given!r}, and {above} is a file")
        return file

    return parse


def _file_above(folder: Path) -> Path | None:
    """What stands in the way of a folder: the path or one above it that exists and is no folder."""
    nearest = next((place for place in (folder, *folder.parents) if place.exists()), None)
    return nearest if nearest is not None and not nearest.is_dir() else None


def _expected(what: str, found: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"expected {what}, found {found!r}")

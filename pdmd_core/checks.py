"""Checks of values that a user chose: a ValueError of one line that starts with the name of the value."""

from __future__ import annotations

import math
from typing import get_args


def check_choice(name: str, value: object, choices: object) -> None:
    """Refuse a value that is none of those of a ``Literal``.

    Args:
        name: What the value is called.
        value: The value.
        choices: A ``Literal`` type.

    Raises:
        ValueError: The value is none of them.
    """
    known = get_args(choices)
    if value not in known:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, known))}, found {value!r}")


def check_number(
    name: str,
    value: float,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    whole: bool = False,
) -> None:
    """Refuse a number that is not finite, outside its range, or not whole.

    Args:
        name: What the value is called.
        value: The value.
        above: Excluded lower limit.
        at_least: Included lower limit.
        below: Excluded upper limit.
        whole: Whether it must be an integer.

    Raises:
        ValueError: The value is no such number.
    """
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if number and math.isfinite(value) and above < value < below and value >= at_least:
        return
    limits = {"above": above, "at least": at_least, "below": below}
    wanted = " and ".join(f"{words} {limit:g}" for words, limit in limits.items() if math.isfinite(limit))
    raise ValueError(f"{name}: expected a {'whole' if whole else 'finite'} number {wanted}, found {value!r}")

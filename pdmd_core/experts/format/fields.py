"""Checks of single fields in JSON of unknown origin, each of which ends in one line.

(Standard library only.)
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import ExpertsError
from .untrusted import shown


def check_object(data: object, what: str, required: set[str], optional: set[str]) -> dict[str, Any]:
    """Check that a value is an object with the right fields.

    Args:
        data: The value.
        what: What it is, for the line.
        required: Fields that it must have.
        optional: Fields that it may have.

    Returns:
        The object.

    Raises:
        ExpertsError: If it is no object, or if a field is missing or unknown.
    """
    if not isinstance(data, dict):
        raise ExpertsError(f"{what} is an object, found {type(data).__name__}")
    missing, unknown = required - set(data), set(data) - required - optional
    if missing:
        raise ExpertsError(f"{what} lacks {', '.join(sorted(missing))}")
    if unknown:
        first, *others = sorted(map(shown, unknown))
        more = f" and {len(others)} more" if others else ""
        raise ExpertsError(f"{what} has unknown field(s) {first}{more}: remove or upgrade")
    return data


def check_field(value: object, where: str, expected: str, accept: Callable[[Any], bool]) -> None:
    """Check one value.

    Args:
        value: The value.
        where: The name of the field, for the line.
        expected: What is expected there, for the line.
        accept: A function that says whether the value is right.

    Raises:
        ExpertsError: If the value is not accepted.
    """
    if not accept(value):
        raise ExpertsError(f"{where} is {expected}, found {shown(value)}")


def is_text(value: object) -> bool:
    """Check that a value is a text of at most 500 printable characters.

    Args:
        value: Any value.

    Returns:
        Whether it is.
    """
    return isinstance(value, str) and value.isprintable() and len(value) <= 500


def matches(pattern: re.Pattern[str], value: object) -> bool:
    """Check that a value is a text of which all matches a pattern.

    Args:
        pattern: A regular expression.
        value: Any value.

    Returns:
        Whether it matches.
    """
    return isinstance(value, str) and bool(pattern.fullmatch(value))


def are_sizes(values: Sequence[object], count: int) -> bool:
    """Check that values are so many whole numbers from 1 to 16384.

    Args:
        values: The values.
        count: The expected number of them.

    Returns:
        Whether they are.
    """
    return len(values) == count and all(type(value) is int and 1 <= value <= 2**14 for value in values)


def are_bfloat16(value: object, most: int) -> bool:
    """Check that a value is a text with finite values of bfloat16 in base64.

    Args:
        value: Any value.
        most: The most values.

    Returns:
        Whether it is, with at least one value.
    """
    if not isinstance(value, str) or len(value) > 4 * most:
        return False
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return False
    if not data or len(data) % 2 or len(data) > 2 * most:
        return False
    return all(number & 0x7F80 != 0x7F80 for number in struct.unpack(f"<{len(data) // 2}H", data))


def is_json(value: object) -> bool:
    """Check that a value can be written as JSON, without NaN and infinity.

    Args:
        value: Any value.

    Returns:
        Whether it can.
    """
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def is_number(value: object) -> bool:
    """Check that a value is a finite number and no boolean.

    Args:
        value: Any value.

    Returns:
        Whether it is.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False

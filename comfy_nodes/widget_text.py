"""What users type into widgets, read into numbers; one line of error for what cannot be read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from .errors import NodeError

TRAINED = "trained"
"""The word for the guidance that the experts were distilled for."""


def read_steps(text: str) -> list[int]:
    """Read the steps of each phase: ``"2, 2"`` is ``[2, 2]``.

    Args:
        text: What the user typed.

    Returns:
        Whole numbers, one for each phase.

    Raises:
        NodeError: If the text is anything else.
    """
    try:
        return [int(word) for word in _split(text, ",")]
    except ValueError:
        raise NodeError(
            f"steps are whole numbers with commas between, one for each phase (2, 2), found {text!r}"
        ) from None


def read_sigmas(text: str) -> list[list[float]]:
    """Read sigmas: ``"1, 0.9375 | 5/6, 0.625"`` is ``[[1.0, 0.9375], [0.8333..., 0.625]]``.

    Args:
        text: What the user typed: numbers or fractions.

    Returns:
        The sigmas of each phase.

    Raises:
        NodeError: If the text is anything else.
    """
    try:
        return [[float(Fraction(word)) for word in _split(group, ",")] for group in _split(text, "|")]
    except (ValueError, ZeroDivisionError, OverflowError):
        raise NodeError(
            "sigmas are numbers or fractions with commas between and | between phases (1, 0.9375 | 5/6, 0.625), "
            f"found {text!r}"
        ) from None


def read_names(text: str) -> list[str] | None:
    """Read names with commas between; nothing at all is None, which stands for the default names."""
    return _split(text, ",") if text.strip() else None


def read_cfgs(text: str, names: Sequence[str], trained: float | None = None) -> list[float | None]:
    """Read one cfg for each phase.

    An empty text is the sampler's cfg for all; "trained" is the guidance that the experts were distilled for; "3.5" is
    the same for all; "3.5, -, 1" is one each, where - is the sampler's.

    Args:
        text: What the user typed.
        names: The names of the phases.
        trained: The guidance that the experts were distilled for; None where it is not known.

    Returns:
        The cfgs, where None is the sampler's.

    Raises:
        NodeError: If the text is anything else.
    """
    words = _split(text, ",") if text.strip() else ["-"]
    if len(words) == 1:
        words = words * len(names)
    if len(words) != len(names):
        raise NodeError(f"cfg has one number for each of the phases {', '.join(names)}, found {len(words)} in {text!r}")
    return [_cfg(word, text, trained) for word in words]


def _cfg(word: str, text: str, trained: float | None) -> float | None:
    if word == "-":
        return None
    if word == TRAINED and trained is not None:
        return trained
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        known = f", {TRAINED}" if trained is not None else ""
        raise NodeError(f"cfg is a number from 0 to 100, - for the sampler's{known}, found {text!r}")
    return value


def _split(text: str, separator: str) -> list[str]:
    return [word.strip() for word in text.split(separator)]

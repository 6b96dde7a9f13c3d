"""What users type into widgets, read into numbers; one line of error for what cannot be read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from .errors import NodeError

TRAINED = "trained"


def read_steps(text: str) -> list[int]:
    """``"2, 2"`` to ``[2, 2]``."""
    try:
        return [int(word) for word in _split(text, ",")]
    except ValueError:
        raise NodeError(
            f"steps are whole numbers with commas between, one for each phase (2, 2), found {text!r}"
        ) from None


def read_sigmas(text: str) -> list[list[float]]:
    """``"1, 0.9375 | 5/6, 0.625"`` to ``[[1.0, 0.9375], [0.8333..., 0.625]]``."""
    try:
        return [[float(Fraction(word)) for word in _split(group, ",")] for group in _split(text, "|")]
    except (ValueError, ZeroDivisionError, OverflowError):
        raise NodeError(
            "sigmas are numbers or fractions with commas between and | between phases (1, 0.9375 | 5/6, 0.625), "
            f"found {text!r}"
        ) from None


def read_names(text: str) -> list[str] | None:
    """``"high_noise, low_noise"`` to its names; nothing at all is None (default names)."""
    return _split(text, ",") if text.strip() else None


def read_cfgs(text: str, names: Sequence[str], trained: float | None = None) -> list[float | None]:
    """One cfg for each phase; None is the sampler's.

    ``""``: the sampler's for all. ``"trained"``: the guidance that the experts were distilled for, where it is known.
    ``"3.5"``: the same for all. ``"3.5, -, 1"``: one each, ``-`` is the sampler's.
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

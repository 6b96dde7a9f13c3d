"""What users type into widgets, read into numbers; one line of error for what cannot be read."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, TypeVar

from ..pdmd_core.phases import BOUNDARY_TOLERANCE, PhasePlan
from .errors import NodeError

Cfg = float | None | tuple[float | None, ...]
"""Of a phase: a number, the sampler's (None), or one of these for each of its steps."""

_AS_TYPED = str.maketrans("\uff0c\u3001\uff5c", ",,|")
"""Commas and lines as Chinese keyboards type them."""
_Value = TypeVar("_Value")

TRAINED = "trained"
"""The word for the guidance that the experts were distilled for."""


def read_steps(text: Any) -> list[int]:
    """Read the steps of each phase: ``"2, 2"`` is ``[2, 2]``.

    Args:
        text: What the user typed.

    Returns:
        Whole numbers, one for each phase.

    Raises:
        NodeError: If the text is anything else.
    """
    text = _text(text)
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
        return [[float(Fraction(word)) for word in _split(group, ",")] for group in _split(_text(text), "|")]
    except (ValueError, ZeroDivisionError, OverflowError):
        raise NodeError(
            "sigmas are numbers or fractions with commas between and | between phases (1, 0.9375 | 5/6, 0.625), "
            f"found {text!r}"
        ) from None


def read_names(text: str) -> list[str] | None:
    """Read names with commas between; nothing at all is None, which stands for the default names.

    A name is that of a file, too: "High Noise" becomes high_noise, 高噪声 (high noise) as well, and a name
    without any letter that a file name may have everywhere becomes phase_1, phase_2 ... by its place.
    """
    if not text.strip():
        return None
    return [_safe(name, place) for place, name in enumerate(_split(_text(text), ","), start=1)]


_CHINESE = {"高": "high_noise", "中": "middle_noise", "低": "low_noise"}


def _safe(name: str, place: int) -> str:
    name = name.strip()
    known = re.fullmatch(r"(.)噪(?:声|音|)", name)
    if known and known[1] in _CHINESE:
        return _CHINESE[known[1]]
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    plain = re.sub(r"[^a-z0-9]+", "_", plain).strip("_")[:58]
    if not plain:
        return f"phase_{place}"
    return plain if plain[0].isalpha() else f"phase_{plain}"


def read_numbers(text: Any, what: str, names: Sequence[str]) -> list[float]:
    """Read one number, or one for each phase.

    Args:
        text: What the user typed, or a number or a list from another node.
        what: What the numbers are, for errors.
        names: The names of the phases.

    Returns:
        A number for each phase.

    Raises:
        NodeError: If the text is anything else.
    """
    text = _text(text)
    try:
        values = [float(word) for word in _split(text, ",")]
    except ValueError:
        values = []
    if len(values) not in (1, len(names)) or not all(math.isfinite(value) for value in values):
        raise NodeError(f"{what} is one number, or one for each of {', '.join(names)} with commas, found {text!r}")
    return values * (len(names) if len(values) == 1 else 1)


def read_boundaries(text: Any) -> list[float | None]:
    """Read boundaries: ``"0.875"``, ``"half"`` (of the steps) or ``"0.9, 0.5"``.

    Args:
        text: What the user typed, or a number from another node.

    Returns:
        Sigmas, descending, where None is half of the steps.

    Raises:
        NodeError: If the text is anything else.
    """
    text = _text(text)
    try:
        return [None if word == "half" else float(Fraction(word)) for word in _split(text.lower(), ",")]
    except (ValueError, ZeroDivisionError, OverflowError):
        raise NodeError(
            f"boundaries are sigmas with commas between (0.875), or half (of the steps), found {text!r}"
        ) from None


def read_cfgs(text: Any, plan: PhasePlan, trained: float | None = None) -> list[Cfg]:
    """Read the cfg of each phase, or of each step.

    An empty text is the sampler's cfg for all; "trained" is the guidance that the experts were distilled for; "3.5" is
    the same for all; "3.5, -, 1" is one for each phase, where - is the sampler's; "3.5, 2 | 1, 1" is one for each step
    of the plan, with | between phases. A list of another node has a number for each phase, or for each step.

    Args:
        text: What the user typed, or a number or a list from another node.
        plan: The plan.
        trained: The guidance that the experts were distilled for; None where it is not known.

    Returns:
        The cfg of each phase: None is the sampler's, a tuple has one for each of its steps.

    Raises:
        NodeError: If the text is anything else.
    """
    return _by_step("cfg", text, plan, "-", lambda word, whole: _cfg(word, whole, trained))


def read_strengths(text: Any, plan: PhasePlan) -> list[float | tuple[float, ...]]:
    """Read the strength of the LoRA of each phase, or at each step: as ``read_cfgs``, where an empty text is 1.

    Args:
        text: What the user typed, or a number or a list from another node.
        plan: The plan.

    Returns:
        The strength of each phase; a tuple has one for each of its steps.

    Raises:
        NodeError: If the text is anything else.
    """
    return _by_step("strength", text, plan, "1", _strength)


def _by_step(
    what: str, value: Any, plan: PhasePlan, usual: str, read: Callable[[str, str], _Value]
) -> list[_Value | tuple[_Value, ...]]:
    text = _text(value, [len(phase.sigmas) for phase in plan.phases])
    names = [phase.name for phase in plan.phases]
    if "|" not in text:
        words = _split(text, ",") if text.strip() else [usual]
        words = words * len(names) if len(words) == 1 else words
        if len(words) != len(names):
            raise NodeError(
                f"{what} has one number for each of the phases {', '.join(names)}, found {len(words)} in {text!r} (one "
                "for each step has | between phases: 3.5, 2 | 1, 1)"
            )
        return [read(word, text) for word in words]
    groups = [_split(group, ",") for group in _split(text, "|")]
    counts = [len(phase.sigmas) for phase in plan.phases]
    if len(groups) != len(names) or any(len(group) not in (1, n) for group, n in zip(groups, counts, strict=False)):
        raise NodeError(
            f"{what} with | has one number for each step of each phase ({' | '.join(map(str, counts))} steps), or one "
            f"for a phase, found {text!r}"
        )
    values = [tuple(read(word, text) for word in group) for group in groups]
    return [each[0] if len(each) == 1 else each for each in values]


def _text(value: Any, counts: Sequence[int] = ()) -> str:
    """What a user would have typed for a value of another node; a list of a number for each step has | in it."""
    if not isinstance(value, list | tuple):
        return str(value).translate(_AS_TYPED)
    words = [str(each) for each in value]
    if len(words) == len(counts) or len(words) != sum(counts):
        return ", ".join(words)
    starts = [sum(counts[:k]) for k in range(len(counts))]
    return " | ".join(", ".join(words[at : at + n]) for at, n in zip(starts, counts, strict=True))


def cfg_at(plan: PhasePlan, k: int, cfg: Cfg, sigma: float) -> float | None:
    """Look up the cfg of phase k at a sigma.

    Args:
        plan: The plan.
        k: The index of the phase.
        cfg: The cfg of the phase, or one for each of its steps.
        sigma: The sigma. One between two steps of the plan has the cfg of the noisier one.

    Returns:
        The cfg; None is the sampler's.
    """
    if not isinstance(cfg, tuple):
        return cfg
    reached = sum(sigma <= other * (1 + BOUNDARY_TOLERANCE) for other in plan.phases[k].sigmas)
    return cfg[max(reached, 1) - 1]


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


def _strength(word: str, text: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not -10 <= value <= 10:
        raise NodeError(f"strength is a number from -10 to 10, found {text!r}")
    return value


def _split(text: str, separator: str) -> list[str]:
    return [word.strip() for word in text.split(separator)]

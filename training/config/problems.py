"""What is wrong with a configuration, in lines that a user can act on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from training.config.keys import suggestion


def leaves_of(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration as dotted keys and their values.

    Args:
        data: Keys and values; sections are mappings.
        prefix: What stands before the keys.
    """
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= leaves_of(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def lines_of(problems: Sequence[Mapping[str, Any]], known: Sequence[str]) -> list[str]:
    """Say what is wrong, a line for each key.

    A value that may be of several types has a problem with each of them: those with what is inside it say the most.

    Args:
        problems: As pydantic lists them.
        known: Every dotted key there is.
    """
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for problem in problems:
        by_name.setdefault(_name(problem["loc"]), []).append(problem)
    outer = {name for name in by_name for other in by_name if name and other.startswith((f"{name}.", f"{name}["))}
    return [line for name, found in by_name.items() if name not in outer for line in _lines_of(name, found, known)]


def _name(place: Sequence[int | str]) -> str:
    """The dotted key of a place, without the types among which a value chooses, such as ``list[int]``."""
    keys = [part for part in place if isinstance(part, int) or not (part == "int" or "[" in part)]
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def _lines_of(name: str, problems: Sequence[Mapping[str, Any]], known: Sequence[str]) -> Iterator[str]:
    first = problems[0]
    found = repr(first["input"]) if len(repr(first["input"])) < 60 else f"{first['input']!r:.57}..."
    messages = [problem["msg"].removeprefix("Value error, ") for problem in problems]
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        for unknown in leaves_of({name: first["input"]}):
            yield f"unknown key {unknown!r}, {suggestion(unknown, known)}"
    elif first["type"] == "missing":
        yield f"{name} is required"
    elif first["type"] == "value_error":  # of a section: those of the library start with the name of a field
        separator = "." if re.match(r"[a-z_]+: ", messages[0]) else ": "
        yield f"{name}{separator}{messages[0]}" if name else messages[0]
    elif first["type"] in ("model_type", "dataclass_type"):
        yield f"{name}: expected a section with keys, found {found}"
    else:
        types = " or ".join(message.partition(", unable")[0] for message in messages)
        wanted = types.replace("or Input should be", "or").replace("tuple", "list")
        yield f"{name}: {wanted}, found {found}{in_quotes(': ') if _was_text(first) else ''}"


def _was_text(problem: Mapping[str, Any]) -> bool:
    """Whether YAML read a mapping where text is expected, as it does for ``a: b``."""
    return problem["type"] == "string_type" and isinstance(problem["input"], dict)


def in_quotes(value: str) -> str:
    """What to say of a text that YAML reads as something else; nothing without a colon in it.

    Args:
        value: The text.
    """
    return " (text with ': ' stands in quotes, as in 'a: b')" if ": " in value else ""

"""The keys that a configuration has: their defaults and descriptions, and what a mistyped one was meant to be."""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel


def fields_of(section: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every key of a section and of the sections in it.

    Args:
        section: A pydantic model or a dataclass.
        prefix: What stands before the names.

    Yields:
        Dotted name, default and description.
    """
    described = _descriptions(section)
    for name, kind, default in _own_fields(section):
        if is_section(kind):
            yield from fields_of(kind, f"{prefix}{name}.")
            continue
        for item in itertools.chain.from_iterable(map(get_args, get_args(kind))):
            if is_section(item):  # a list of them
                yield from fields_of(item, f"{prefix}{name}[].")
        choices = f" of {'|'.join(get_args(kind))}" if get_origin(kind) is Literal else ""
        yield f"{prefix}{name}", default + choices, described.get(name, "")


def kind_of(section: type, key: str) -> Any:
    """The type of a key.

    Args:
        section: A pydantic model or a dataclass.
        key: The dotted name of a field in it, or in a section in it.

    Returns:
        The type; None for a key that is not there.
    """
    name, _, inner = key.partition(".")
    kind = next((kind for own, kind, _ in _own_fields(section) if own == name), None)
    if not inner:
        return kind
    return kind_of(kind, inner) if kind is not None and is_section(kind) else None


def takes_null(kind: Any) -> bool:
    """Whether null is a value of this type."""
    return type(None) in get_args(kind)


def is_text(kind: Any) -> bool:
    """Whether all values of this type are text, paths or words, but for null."""
    if kind in (str, Path) or get_origin(kind) is Literal:
        return kind in (str, Path) or all(isinstance(word, str) for word in get_args(kind))
    kinds = [item for item in get_args(kind) if item is not type(None)]
    return takes_null(kind) and len(kinds) == 1 and is_text(kinds[0])


def is_section(kind: Any) -> bool:
    """Whether a field of this type is a section with keys of its own."""
    return isinstance(kind, type) and (issubclass(kind, BaseModel) or is_dataclass(kind))


def _own_fields(section: type) -> Iterator[tuple[str, Any, str]]:
    """Name, type and default of each field."""
    hints = get_type_hints(section)
    if issubclass(section, BaseModel):
        for name, info in section.model_fields.items():
            yield name, hints[name], "required" if info.is_required() else str(info.default)
    elif is_dataclass(section):
        for field in fields(section):
            yield field.name, hints[field.name], "required" if field.default is MISSING else str(field.default)


def _descriptions(section: type) -> dict[str, str]:
    """The text under each field, of a class and of those that it extends."""
    found = {}
    for kind in reversed([kind for kind in section.__mro__ if not issubclass(BaseModel, kind)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, after in itertools.pairwise(definition.body):
            match statement, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def suggestion(name: str, known: Sequence[str]) -> str:
    """What to say of an unknown dotted key: the keys that it may mean, or else those of its section.

    Args:
        name: The unknown key.
        known: Every key there is.

    Returns:
        The end of a sentence that starts with the unknown key.
    """
    *_, last = parts = re.sub(r"\[\d+\]", "[]", name).split(".")
    meant: list[str] = []
    elsewhere = [key for key in known if key.rpartition(".")[2] == last]
    options: list[str] = []
    for part in parts:
        start = "".join(f"{found}." for found in meant)
        options = list(dict.fromkeys(k.removeprefix(start).partition(".")[0] for k in known if k.startswith(start)))
        near = [part] if part in options else difflib.get_close_matches(part, options, n=1, cutoff=0.6)
        if not near:
            break
        meant += near
    whole = [".".join(meant)] if len(meant) == len(parts) else []
    likely = whole if meant[-1:] == [last] else list(dict.fromkeys([*whole, *elsewhere]))
    if likely:
        return f"did you mean {' or '.join(map(repr, likely))}?"
    return f"expected{' in ' + '.'.join(meant) if meant else ''}: {', '.join(options)}"

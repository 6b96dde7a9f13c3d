"""What nodes say, in the language of the front end that asked; logs stay in English.

Sentences are written in English where they are needed. ``locales/<language>/sentences.json`` has each of them, as its
source has it, with ``{}`` for what is filled in, beside its translation. (Standard library only.)
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

LOCALES = Path(__file__).resolve().parents[1] / "locales"
_LONGEST, _DEPTH, _CLIENTS = 4000, 4, 100

_languages: dict[str, str] = {}
"""The language of each front end that has asked for something, the newest last."""
_speaking: ContextVar[str | None] = ContextVar("speaking", default=None)
"""The language of the request that is being answered."""
Sentences = tuple[tuple[re.Pattern[str], str], ...]


@contextmanager
def speaking(locale: str, client: str) -> Iterator[None]:
    """Answer a front end in its language, and remember it for what its prompts say while they run.

    Args:
        locale: The language that it shows, such as ``zh`` or ``zh-TW``.
        client: The id with which it queues prompts.

    Yields:
        Nothing.
    """
    spoken = locale.split("-")[0].lower()
    if client:
        _languages.pop(client, None)
        _languages[client] = spoken
        while len(_languages) > _CLIENTS:
            _languages.pop(next(iter(_languages)))
    token = _speaking.set(spoken)
    try:
        yield
    finally:
        _speaking.reset(token)


def said(text: str) -> str:
    """Say sentences of this pack, one a line, in the language of who will read them.

    Args:
        text: English.

    Returns:
        The translation; what has none stays as it is.
    """
    known = _sentences(language())
    if not known or len(text) > _LONGEST:
        return text
    return "\n".join(_translated(line, known, _DEPTH) for line in text.split("\n"))


def language() -> str:
    """Return the language of who will read what is said now, such as ``en``."""
    asked = _speaking.get()
    if asked is not None:
        return asked
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    client = getattr(getattr(server, "instance", None), "client_id", None)
    if client is None:  # a prompt that is not checked yet: who asked last queued it
        return next(reversed(_languages.values()), "en")
    return _languages.get(client, "en")


@functools.cache
def _sentences(spoken: str) -> Sentences:
    file = LOCALES / spoken / "sentences.json"
    if not spoken.isalpha() or not file.is_file():
        return ()
    pairs: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    by_words = sorted(pairs.items(), key=lambda pair: -len(pair[0].replace("{}", "")))
    return tuple((re.compile("(.*?)".join(map(re.escape, text.split("{}")))), other) for text, other in by_words)


def _translated(text: str, known: Sentences, depth: int) -> str:
    if not text or not depth:
        return text
    for pattern, other in known:
        found = pattern.fullmatch(text)
        if found:
            return other.format(*(_translated(part, known, depth - 1) for part in found.groups()))
    if "; " in text:
        return "; ".join(_translated(part, known, depth - 1) for part in text.split("; "))
    head, colon, rest = text.partition(": ")
    return f"{head}: {_translated(rest, known, depth)}" if colon else text

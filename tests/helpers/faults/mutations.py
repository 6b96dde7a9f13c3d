"""Hypothesis strategies: valid JSON documents and files with something wrong in them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

NUMBERS = [0, -1, 1, 2**31, 2**63, 2**64 - 1, 10**30, -(10**30), 10**400, 0.0, -0.5, 1.5, 1e-320, 1e308]
TEXTS = [
    *["", "a", "a\nb", "\u2028", "\ud800", "\x00", "\x1b[2J", "\u202e", "ü", "x" * 3000],
    *["../x.safetensors", "..\\x.safetensors", "/etc/passwd", "C:\\x.safetensors", "sub/x.safetensors", "~", "."],
    *["low_noise.safetensors", "phased_experts.json", "x.safetensors\n", "x\x00.safetensors", "CON.safetensors"],
    *["high_noise", "low_noise", "lora", "full", "transformer_2", "wan", "F32", "BF16", "BOOL", "__metadata__"],
]
CONSTANTS = [None, True, False, float("nan"), float("inf"), [], {}, [[]], {"a": {}}, {"__proto__": 1}]
VALUES = st.sampled_from([*NUMBERS, *TEXTS, *CONSTANTS])
DEEP = "\u0000deep"
"""Stands for nesting, which json.dumps itself could not write."""


def _parents(value: Any) -> Iterator[dict[str, Any] | list[Any]]:
    """Every object and list in a document that holds something."""
    if isinstance(value, dict | list) and value:
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _parents(inner)


@st.composite
def mutated(draw: st.DrawFn, valid: Any) -> Any:
    """A document after one to three changes: entries dropped, replaced, added, exchanged, repeated or nested."""
    data = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        options = list(_parents(data))
        if not options:
            break
        parent: Any = options[draw(st.integers(0, len(options) - 1))]
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        key, other = (keys[draw(st.integers(0, len(keys) - 1))] for _ in range(2))
        match draw(st.sampled_from(["drop", "replace", "add", "exchange", "wrap", "repeat", "number", "deep"])):
            case "drop":
                del parent[key]
            case "replace":
                parent[key] = copy.deepcopy(draw(VALUES))
            case "add" if isinstance(parent, dict):
                parent[draw(st.sampled_from(TEXTS))] = copy.deepcopy(draw(VALUES))
            case "exchange":
                parent[key], parent[other] = parent[other], parent[key]
            case "wrap":
                parent[key] = draw(st.sampled_from([[parent[key]], {"a": parent[key]}, json.dumps(parent[key])]))
            case "repeat" if isinstance(parent, list):
                parent.extend(copy.deepcopy(parent) * draw(st.sampled_from([1, 50])))
            case "number" if isinstance(parent[key], int | float):
                parent[key] += draw(st.sampled_from([1, -1, 8, 0.5, -parent[key], 2**32]))
            case "deep":
                parent[key] = DEEP
            case _:
                parent[key] = str(parent[key])
    return data


@st.composite
def documents(draw: st.DrawFn, valid: Any) -> bytes:
    """The text of a mutated document, or of the valid one with bytes changed, cut out, put in or repeated."""
    if draw(st.booleans()):
        text = json.dumps(draw(mutated(valid))).encode()
        depth = draw(st.sampled_from([1, 31, 200, 990, 5000]))
        bracket, end = draw(st.sampled_from([(b"[", b"]"), (b'{"a":', b"}")]))
        return text.replace(json.dumps(DEEP).encode(), bracket * depth + b"1" + end * depth)
    text = json.dumps(valid).encode()
    return draw(damaged(text))


SNIPPETS = [
    *[b"", b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b",", b"}", b"]", b'"', b"{", b"[" * 40, b"\\u0000"],
    *[b"NaN", b"-Infinity", b"1e999", b"1" * 5000, b"/*", b" ", b'"a":1,', b"-", b".", b"\\", b"\\ud800"],
]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with one to three of them flipped, a piece cut out, something put in, a piece doubled, or the end lost."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.sampled_from([0, 1, 2, 8, 40, 400]))
        match draw(st.sampled_from(["flip", "cut", "insert", "double", "end"])):
            case "flip" if content:
                changed = content[at] ^ (1 << draw(st.integers(0, 7)))
                content = content[:at] + bytes([changed]) + content[at + 1 :]
            case "cut":
                content = content[:at] + content[at + length :]
            case "insert":
                content = content[:at] + draw(st.sampled_from(SNIPPETS)) + content[at + length :]
            case "double":
                content = content[:at] + content[at : at + length] * 2 + content[at + length :]
            case _:
                content = content[:at]
    return content

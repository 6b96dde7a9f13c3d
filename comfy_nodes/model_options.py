"""What was patched onto a MODEL after a certain moment, and putting it onto another one. (Standard library only.)

ComfyUI's options are nested dicts and lists of functions and other leaves; copies share the leaves, so that identity
tells what was there before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def copied(options: Any) -> Any:
    """The same nested dicts and lists, new containers, shared leaves."""
    if isinstance(options, dict):
        return {key: copied(value) for key, value in options.items()}
    return [copied(value) for value in options] if isinstance(options, list) else options


def with_added_options(
    own: Mapping[Any, Any], now: Mapping[Any, Any], then: Mapping[Any, Any], skip: Collection[Any] = ()
) -> dict[Any, Any]:
    """``own`` plus all that ``now`` has and ``then`` had not: new keys, other leaves, further entries of lists.

    skip: keys, at any depth, that stay as they are in ``own``.
    """
    result = copied(own)
    for key, value in now.items():
        before = then.get(key)
        if key in skip:
            continue
        if isinstance(value, dict):
            inner, past = result.get(key), before if isinstance(before, dict) else {}
            if value or inner is None:
                result[key] = with_added_options(inner if isinstance(inner, dict) else {}, value, past, skip)
        elif isinstance(value, list):
            known = before if isinstance(before, list) else []
            new = [entry for entry in value if not any(entry is other for other in known)]
            result[key] = [*(result.get(key) or []), *new]
        elif key not in then or before is not value:
            result[key] = value
    return result

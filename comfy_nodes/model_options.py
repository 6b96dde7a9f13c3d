"""Find what was patched onto a MODEL after a certain moment, and put it onto another one.

ComfyUI's options are nested dicts and lists of functions and other leaves; copies share the leaves, so that identity
tells what was there before. (Standard library only.)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def copied(options: Any) -> Any:
    """Copy nested dicts and lists: new containers, shared leaves."""
    if isinstance(options, dict):
        return {key: copied(value) for key, value in options.items()}
    return [copied(value) for value in options] if isinstance(options, list) else options


def with_added_options(
    own: Mapping[Any, Any], now: Mapping[Any, Any], then: Mapping[Any, Any], skip: Collection[Any] = ()
) -> dict[Any, Any]:
    """Add to ``own`` all that ``now`` has and ``then`` had not: new keys, other leaves, further entries of lists.

    Args:
        own: The options to add to.
        now: The options with what was added.
        then: The options before.
        skip: Keys, at any depth, that stay as they are in ``own``.

    Returns:
        New options.
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

"""Full experts that are in memory already: another text in a widget does not read their files again.

ComfyUI drops what a node made before it runs the node again. What is in use is therefore held from the moment at which
ComfyUI asks whether a node has changed until the node has run, or until another prompt comes; at other times it is kept
by ComfyUI's own cache alone, and goes with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

Key = tuple[Any, ...]
_models: weakref.WeakValueDictionary[Key, Any] = weakref.WeakValueDictionary()
_held: list[Any] = []


def key_of(path: Path, digest: str, *rest: Any) -> Key:
    """Name a file by what it is: its place, hash, time of change and size.

    Args:
        path: The file.
        digest: Its hash, as its manifest says.
        rest: What else decides how it is loaded.

    Returns:
        The key.
    """
    found = path.stat()
    return (str(path), digest, found.st_mtime_ns, found.st_size, *rest)


def loaded(key: Key, load: Callable[[], Any]) -> Any:
    """Return the MODEL of this key that is in memory, or load it.

    Args:
        key: What ``key_of`` returned.
        load: Loads it.

    Returns:
        The MODEL; the same one for the same key. Nobody changes it.
    """
    model = _models.get(key)
    if model is None:
        model = _models[key] = load()
    return model


def hold(folder: Path) -> None:
    """Hold the MODELs of a folder that are in memory, until ``let_go``."""
    _held.extend(model for key, model in list(_models.items()) if Path(key[0]).parent == folder)


def let_go(*_: Any) -> Any:
    """Hold nothing any more; as a handler of prompts, pass them on."""
    _held.clear()
    return _[0] if _ else None

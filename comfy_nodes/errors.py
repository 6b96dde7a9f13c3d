"""The error of what users can solve themselves, and how it is worded on a node."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

from ..pdmd_core.experts.errors import ExpertsError
from ..pdmd_core.phases import PhasePlanError
from .language import said

_Result = TypeVar("_Result")


class NodeError(ValueError):
    """One line that says what was expected, what was found and what to do. ComfyUI shows it on the node."""


NodeError.__module__ = "builtins"  # ComfyUI writes the module before the name, and ours is a path on the user's disk
_LEADING_FILE = re.compile(
    r"(?P<file>(?:/|[A-Za-z]:\\)[^:]*?[/\\](?P<name>[^/\\:]+)|[\w.+-]+\.\w{2,12}(?: of [^/\\:]+)?): (?P<rest>.+)", re.S
)
_PATH = re.compile(r"(?<![\w:/])(?:/|[A-Za-z]:\\)(?:[^\s:'\"/\\]+[/\\])+(?=[^\s:'\"/\\])")


def worded(text: str) -> str:
    """Let an error lead with its sentence, in the reader's language, and name files without their folders.

    Args:
        text: An error of the library, such as ``/models/loras/x.safetensors: not a readable safetensors file``.

    Returns:
        For example ``not a readable safetensors file (x.safetensors)``.
    """
    found = _LEADING_FILE.fullmatch(text)
    if found is None:
        return _PATH.sub("", said(text))
    return _PATH.sub("", f"{said(found['rest'])} ({found['name'] or found['file']})")


def in_words(execute: Callable[..., _Result]) -> Callable[..., _Result]:
    """Decorate what a node does, so that all that users can solve is a ``NodeError`` that leads with its sentence."""

    @functools.wraps(execute)
    def wrapped(*args: Any, **inputs: Any) -> _Result:
        try:
            return execute(*args, **inputs)
        except (NodeError, ExpertsError, PhasePlanError) as error:
            raise NodeError(worded(str(error))) from error.__cause__

    return wrapped

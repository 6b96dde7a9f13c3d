"""Files of unknown origin: JSON without surprises, and no way out of a folder.

(Standard library only.)
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from ..errors import ExpertsError

MAX_DEPTH = 32
"""The most objects and lists within each other; a manifest needs five."""
MAX_JSON_BYTES = 4 * 2**20
"""The most bytes of a JSON file."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
_SHARED_BLOB = re.compile(r"[0-9a-f]{64}")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON as the standard defines it: no key twice, no NaN or infinity, at most ``MAX_DEPTH`` levels.

    Args:
        text: JSON text, or its bytes in UTF-8.

    Returns:
        The parsed data.

    Raises:
        ValueError: If it is anything else; the message continues a line that says that it is not JSON.
    """
    try:
        if isinstance(text, bytes):  # json itself guesses UTF-16 and UTF-32 as well
            text = text.decode("utf-8")
        data = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise ValueError(f"more than {MAX_DEPTH} objects and lists in each other") from None
    level, depth = [data], 0
    while level := [value for value in level if isinstance(value, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} objects and lists in each other")
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
    if _SURROGATE.search(text):
        try:
            json.dumps(data, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair is no character") from None
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(next(key for key in keys if keys.count(key) > 1))} is there twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{shown(text)} is beyond every number")
    return number


def shown(value: object) -> str:
    """Write a value for an error message: one line of at most 80 characters, with nothing that a terminal obeys.

    Args:
        value: Any value.

    Returns:
        The line.
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; lists in lists in lists
        text = type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def read_json(path: Path, most: int = MAX_JSON_BYTES) -> Any:
    """Read and parse a JSON file.

    Args:
        path: The file.
        most: The most bytes that it may have.

    Returns:
        The parsed data.

    Raises:
        ExpertsError: If the file is missing, unreadable, too large or not JSON.
    """
    try:
        if not path.is_file():
            raise ExpertsError(f"{path}: no such file")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, ExpertsError):
            raise
        raise ExpertsError(f"{path}: cannot be read ({error})") from None
    if len(content) > most:
        raise ExpertsError(f"{path}: {path.stat().st_size} bytes, such a file has at most {most}")
    try:
        return parse_json(content)
    except ValueError as error:
        raise ExpertsError(f"{path}: is not JSON: {error}") from None


def check_inside(path: Path, folder: Path) -> None:
    """Check that a path does not lead, over links, out of a folder; links of the Hub's cache are followed.

    Args:
        path: A path in the folder.
        folder: The folder.

    Raises:
        ExpertsError: If the path leaves the folder.
    """
    try:
        inside = folder.resolve() in path.resolve().parents or _is_hub_blob(path)
    except (OSError, RuntimeError):  # links in a circle
        inside = False
    if not inside:
        raise ExpertsError(f"{path}: a link that leaves the folder is not followed: put the file itself there")


def _is_hub_blob(path: Path) -> bool:
    """Whether a path is a link of the Hub's download cache to a blob of the same repository.

    The cache links snapshots/<revision>/<file> to blobs/<hash>. That may be a link itself, to blobs/<two
    digits>/<hash>, which all repositories of the cache share.
    """
    if not path.is_symlink():
        return False
    target = (path.parent / path.readlink()).absolute()
    blob = target.parent.resolve() / target.name
    repository = blob.parent.parent
    if blob.parent.name != "blobs" or repository / "snapshots" not in path.parent.resolve().parents:
        return False
    stored = blob.resolve()
    shared = stored.parent.parent == repository.parent / "blobs" and bool(_SHARED_BLOB.fullmatch(stored.name))
    return stored == blob or shared

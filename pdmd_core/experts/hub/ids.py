"""Names of repositories and files on the Hugging Face Hub, read with the standard library alone."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PART = re.compile(r"[\w.+=@() -]+")
_PAGES = ("tree", "blob", "resolve", "raw")
"""Kinds of pages of a repository, after which the address has revision and path."""


@dataclass(frozen=True)
class HubAddress:
    """A place in a repository on the Hub."""

    repo_id: str
    """The repository, ``user/name``."""
    path: str = ""
    """A folder or file in it; empty for its top."""
    revision: str | None = None
    """A branch, tag or commit, where the address has one."""


def is_hub_id(text: str) -> bool:
    """Check whether a text has the form ``user/name`` of a repository's id.

    Args:
        text: Any text.

    Returns:
        Whether it has that form; the Hub is not asked.
    """
    return bool(_HUB_ID.fullmatch(text))


def hub_address(text: str) -> HubAddress | None:
    """Read what people write or paste for a place on the Hub.

    Args:
        text: ``user/name``, ``user/name/path``, ``hf://user/name@revision/path``, or the address of a page of the Hub
            or of a file, such as ``https://huggingface.co/user/name/blob/main/path``.

    Returns:
        The place, or None where the text has none of these forms; the Hub is not asked.
    """
    text, revision = text.strip(), None
    if text.startswith(("http://", "https://")):
        url = urlsplit(text)
        hosts = {"huggingface.co", "hf.co", "www.huggingface.co", urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc}
        if not url.netloc or url.netloc not in hosts:
            return None
        parts = [unquote(part) for part in url.path.split("/") if part]
        if len(parts) > 3 and parts[2] in _PAGES:
            revision, parts = parts[3], [*parts[:2], *parts[4:]]
        elif len(parts) > 2:
            return None
    else:
        parts = text.removeprefix("hf://").split("/")
        if len(parts) > 1 and "@" in parts[1]:
            parts[1], _, revision = parts[1].partition("@")
    repo_id, path = "/".join(parts[:2]), parts[2:]
    if not is_hub_id(repo_id) or not all(_PART.fullmatch(part) and part not in (".", "..") for part in path):
        return None
    return HubAddress(repo_id, "/".join(path), unquote(revision) if revision else None)

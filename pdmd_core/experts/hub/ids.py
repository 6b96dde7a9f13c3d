"""Names of repositories on the Hugging Face Hub, checked with the standard library alone."""

from __future__ import annotations

import re

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(text: str) -> bool:
    """Check whether a text has the form ``user/name`` of a repository's id.

    Args:
        text: Any text.

    Returns:
        Whether it has that form; the Hub is not asked.
    """
    return bool(_HUB_ID.fullmatch(text))

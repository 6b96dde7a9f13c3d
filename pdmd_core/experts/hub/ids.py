"""What a repository on the Hugging Face Hub is called. (Standard library only.)"""

from __future__ import annotations

import re

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(text: str) -> bool:
    """Whether a text has the form ``user/name`` of a repository's id."""
    return bool(_HUB_ID.fullmatch(text))

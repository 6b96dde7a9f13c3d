"""Failures of Hub and network: passing ones are tried again, the rest become one line that says what to do."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ..errors import ExpertsError

ATTEMPTS = 4
"""How often a step is tried while server or network fail, with pauses of 1, 2 and 4 s."""

_PASSING_STATUS = (408, 429, 500, 502, 503, 504)

T = TypeVar("T")
logger = logging.getLogger(__name__)


def persistently(what: str, timeout: float, call: Callable[[], T]) -> T:
    """Call, and call again after a passing failure of server or network, at most ``ATTEMPTS`` times.

    Args:
        what: What is done, for the log.
        timeout: Seconds to wait for each answer or packet.
        call: What to do.

    Returns:
        What the call returns.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            with patience(timeout):
                return call()
        except Exception as error:
            if not is_passing(error):
                raise
            wait = 2 ** (attempt - 1)
            logger.warning(
                "%s: %s; attempt %d of %d follows in %d s", what, explain(error, None), attempt + 1, ATTEMPTS, wait
            )
            time.sleep(wait)
    with patience(timeout):
        return call()


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Limit, within the block, how long the Hub's client waits; by itself it waits for ever on most requests.

    All threads share one client. Where blocks overlap, the longest of their times holds; when the last one ends, the
    client has again what it had before the first.

    Args:
        seconds: Seconds to wait for each answer or packet.

    Yields:
        Nothing.
    """
    with _shared:
        _patiences.append(seconds)
        _set_timeouts()
    try:
        yield
    finally:
        with _shared:
            _patiences.remove(seconds)
            _set_timeouts()


_shared = threading.Lock()
_patiences: list[float] = []
"""Of the blocks that have not ended."""
_changed: list[tuple[Any, Any]] = []
"""Clients whose timeout they set, with the one that each had: huggingface_hub makes a new client after some errors."""


def _set_timeouts() -> None:
    from huggingface_hub.utils import get_session

    client: Any = get_session()
    if _patiences:
        if all(client is not known for known, _ in _changed):
            _changed.append((client, client.timeout))
        client.timeout = max(_patiences)
    else:
        for known, before in _changed:
            known.timeout = before
        _changed.clear()


def is_passing(error: BaseException) -> bool:
    """Check whether an error is a failure of server or network that another attempt may not meet.

    Args:
        error: What the client raised.

    Returns:
        Whether another attempt makes sense.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _PASSING_STATUS
    if isinstance(error, OfflineModeIsEnabled):
        return False
    # JSONDecodeError: the error page of a gateway; the client's size check is an OSError without a number
    cut_off = isinstance(error, OSError) and "Consistency check failed" in str(error)
    return isinstance(error, HTTPError | ConnectionError | TimeoutError | json.JSONDecodeError) or cut_off


@contextmanager
def one_line(doing: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub's client raises within the block into one line; bugs of this package are not hidden.

    Args:
        doing: What is done, as the start of the line.
        revision: The revision that was asked for, for the line.

    Yields:
        Nothing.

    Raises:
        ExpertsError: If the client raised an error of the Hub, the network or the disk.
    """
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except ExpertsError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: hf_xet
        raise ExpertsError(f"{doing}: {explain(error, revision)}") from None


def hub_error(error: BaseException) -> BaseException | None:
    """Find the Hub's own answer behind an error of another library, which may tell something else.

    Args:
        error: What the library raised.

    Returns:
        The error of the Hub's client that led to it; None where there is none.
    """
    from huggingface_hub.errors import HfHubHTTPError

    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, HfHubHTTPError):
            return cause
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return None


def explain(error: BaseException, revision: str | None) -> str:
    """Say what an error of the Hub's client means and what to do.

    Args:
        error: What the client raised.
        revision: The revision that was asked for.

    Returns:
        One line.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    login = "run `hf auth login`, set HF_TOKEN or give token="
    text = " ".join(str(error).split())[:300]
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on: unset HF_HUB_OFFLINE"
    if isinstance(error, GatedRepoError):
        return f"it is gated: accept its conditions on its page, then {login} of that account"
    if isinstance(error, RepositoryNotFoundError):
        return f"no such repository, or it is private and your token may not see it: check the id, or {login}"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision!r}: give a branch, a tag or a commit hash of it"
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, error.server_message or text
        if status == 401:
            return f"the Hub refuses the token (401): make a new one in your settings there and {login}"
        if status == 403:
            return f"the token may not do this (403, {said}): {login} with write access"
        later = "; try again later" if status in _PASSING_STATUS else ""
        return f"the Hub answers {status}: {said}{later}"
    if isinstance(error, LocalEntryNotFoundError) or is_passing(error):
        cause = error.__cause__ or error
        return f"no usable answer from {constants.ENDPOINT} ({type(cause).__name__}): check the connection, try again"
    return text or type(error).__name__

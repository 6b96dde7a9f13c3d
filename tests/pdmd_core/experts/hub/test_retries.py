"""The timeout of the Hub's client, which all threads share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub.utils import close_session, get_session

from pdmd_core.experts.hub.retries import patience


@pytest.fixture(autouse=True)
def client() -> Iterator[Any]:
    close_session()
    yield get_session()
    close_session()


def read_timeout() -> float | None:
    return get_session().timeout.read


def test_blocks_of_two_threads_that_overlap_leave_the_client_as_it_was() -> None:
    """The first to begin is the first to end: the second must keep its time, and nobody the first one's."""
    get_session().timeout = 99.0
    second_began, first_ended, found = threading.Event(), threading.Event(), []

    def second() -> None:
        with patience(10.0):
            found.append(read_timeout())
            second_began.set()
            first_ended.wait(10)
            found.append(read_timeout())

    thread = threading.Thread(target=second)
    with patience(20.0):
        thread.start()
        assert second_began.wait(10)
        found.append(read_timeout())
    first_ended.set()
    thread.join()
    assert found == [20.0, 20.0, 10.0]
    assert read_timeout() == 99.0


def test_blocks_in_each_other_and_equal_ones() -> None:
    with patience(10.0), pytest.raises(KeyError):
        with patience(10.0):
            assert read_timeout() == 10.0
        with patience(5.0):
            assert read_timeout() == 10.0
            raise KeyError
    assert read_timeout() is None


def test_a_client_that_is_made_meanwhile_has_the_time_of_the_next_block() -> None:
    with patience(10.0):
        close_session()
        with patience(5.0):
            assert read_timeout() == 10.0
    assert read_timeout() is None

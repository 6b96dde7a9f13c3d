"""Progress on a terminal and in a log file."""

from __future__ import annotations

import io
import re
import sys

import pytest

from training.monitoring import bars


def test_outside_a_terminal_progress_is_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(bars, "SECONDS_BETWEEN_LINES", 0.0)
    with bars.progress_bar(total=3, desc="high_noise") as bar:
        for _ in range(3):
            bar.set_postfix({"loss": "1"}, refresh=False)
            bar.update()
    text = stream.getvalue()
    assert "\r" not in text and "\n\n" not in text
    line = text.splitlines()[-1]
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d high_noise: 3 of 3, .*loss=1, 00:00 passed, 00:00 left$", line)


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(bars.progress_bar(range(3), desc="encode")) == [0, 1, 2]
    assert "\r" in stream.getvalue()

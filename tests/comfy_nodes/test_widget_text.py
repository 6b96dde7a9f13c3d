"""What users type into widgets."""

from __future__ import annotations

import pytest


def test_steps(part) -> None:
    assert part("widget_text").read_steps(" 2,2 ,1") == [2, 2, 1]


@pytest.mark.parametrize("text", ["", "two", "2;2", "2,,2", "2.5"])
def test_steps_that_are_none(part, text: str) -> None:
    with pytest.raises(part("errors").NodeError, match="steps are whole numbers with commas between"):
        part("widget_text").read_steps(text)


def test_sigmas_are_numbers_or_fractions(part) -> None:
    assert part("widget_text").read_sigmas("1, 0.9375 | 5/6, 0.625") == [[1.0, 0.9375], [5 / 6, 0.625]]


@pytest.mark.parametrize("text", ["", "1, | 0.5", "1/0", "1, x", "nan", "1e9999/1"])
def test_sigmas_that_are_none(part, text: str) -> None:
    with pytest.raises(part("errors").NodeError, match="sigmas are numbers or fractions"):
        part("widget_text").read_sigmas(text)


def test_names(part) -> None:
    assert part("widget_text").read_names("a, b") == ["a", "b"]
    assert part("widget_text").read_names("  ") is None


@pytest.mark.parametrize(
    ("text", "trained", "expected"),
    [
        ("", None, [None, None]),
        ("-", None, [None, None]),
        ("3.5", None, [3.5, 3.5]),
        ("3.5, -", None, [3.5, None]),
        ("trained", 1.0, [1.0, 1.0]),
        ("3.5, trained", 1.0, [3.5, 1.0]),
    ],
)
def test_cfgs(part, text: str, trained: float | None, expected: list[float | None]) -> None:
    assert part("widget_text").read_cfgs(text, ["high", "low"], trained) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1, 2, 3", "one number for each of the phases high, low, found 3"),
        ("1,", "cfg is a number from 0 to 100"),
        ("-1", "cfg is a number from 0 to 100"),
        ("nan", "cfg is a number from 0 to 100"),
        ("trained", "cfg is a number from 0 to 100"),  # nothing is known of training here
    ],
)
def test_cfgs_that_are_none(part, text: str, message: str) -> None:
    with pytest.raises(part("errors").NodeError, match=message):
        part("widget_text").read_cfgs(text, ["high", "low"])

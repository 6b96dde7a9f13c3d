"""What users type into widgets."""

from __future__ import annotations

import pytest


def plan_of(part):
    return part("timeline").PhasePlan.from_steps([2, 2], 5.0, ["high", "low"])


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


def test_names_as_people_write_them_become_those_of_files(part) -> None:
    read = part("widget_text").read_names
    assert read("High Noise, Low-Noise, \u00c9tape 1, 2nd") == ["high_noise", "low_noise", "etape_1", "phase_2nd"]
    assert read("\u9ad8\u566a\u58f0\uff0c\u4f4e\u566a\u58f0") == ["high_noise", "low_noise"]
    assert read("\u524d, \u540e") == ["phase_1", "phase_2"]


@pytest.mark.parametrize(
    ("text", "trained", "expected"),
    [
        ("", None, [None, None]),
        ("-", None, [None, None]),
        ("3.5", None, [3.5, 3.5]),
        ("3.5, -", None, [3.5, None]),
        ("trained", 1.0, [1.0, 1.0]),
        ("3.5, trained", 1.0, [3.5, 1.0]),
        ("3.5, 2 | -", None, [(3.5, 2.0), None]),
        ("1 | 2, -", None, [1.0, (2.0, None)]),
        (3.5, None, [3.5, 3.5]),
        ("3.5\uff0c2 \uff5c -", None, [(3.5, 2.0), None]),  # as Chinese keyboards type it
        ([3.5, 1], None, [3.5, 1.0]),  # lists of other nodes: for each phase, for each step
        ((3.5, 2, 1, 1), None, [(3.5, 2.0), (1.0, 1.0)]),
    ],
)
def test_cfgs(part, text: str, trained: float | None, expected: list[float | None]) -> None:
    assert part("widget_text").read_cfgs(text, plan_of(part), trained) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1, 2, 3", "one number for each of the phases high, low, found 3"),
        ("1, 2 | 3, 4, 5", r"one number for each step of each phase \(2 \| 2 steps\)"),
        ("1 | 2 | 3", "cfg with | has one number"),
        ("1,", "cfg is a number from 0 to 100"),
        ("-1", "cfg is a number from 0 to 100"),
        ("nan", "cfg is a number from 0 to 100"),
        ("trained", "cfg is a number from 0 to 100"),  # nothing is known of training here
    ],
)
def test_cfgs_that_are_none(part, text: str, message: str) -> None:
    with pytest.raises(part("errors").NodeError, match=message):
        part("widget_text").read_cfgs(text, plan_of(part))


def test_strengths_are_read_as_cfgs_are(part) -> None:
    read, plan = part("widget_text").read_strengths, plan_of(part)
    assert read("", plan) == [1.0, 1.0] and read(" 1.1, -0.8", plan) == [1.1, -0.8]
    assert read("1, 0.9 | 0.8", plan) == [(1.0, 0.9), 0.8]
    assert read([1, 0.9, 0.8, 0.8], plan) == [(1.0, 0.9), (0.8, 0.8)]
    for text, message in (("11", "from -10 to 10"), ("a", "from -10 to 10"), ([1, 2, 3], "strength has one number")):
        with pytest.raises(part("errors").NodeError, match=message):
            read(text, plan)


def test_other_widgets_take_numbers_and_lists_of_other_nodes(part) -> None:
    text = part("widget_text")
    assert text.read_steps([2, 2]) == [2, 2] and text.read_steps(4) == [4]
    assert text.read_boundaries(0.875) == text.read_boundaries([0.875]) == [0.875]
    assert text.read_numbers([8.0, 5.0], "shift", ["a", "b"]) == [8.0, 5.0]


def test_cfg_at_a_sigma(part) -> None:
    at, plan = part("widget_text").cfg_at, plan_of(part)
    assert [at(plan, 0, (3.5, 2.0), sigma) for sigma in (1.0, 0.95, 0.9375, 0.9)] == [3.5, 3.5, 2.0, 2.0]
    assert [at(plan, 1, (3.0, None), sigma) for sigma in (5 / 6, 0.7, 0.625, 0.0)] == [3.0, 3.0, None, None]
    assert at(plan, 1, 2.0, 0.5) == 2.0


def test_numbers_for_all_or_for_each(part) -> None:
    read, names = part("widget_text").read_numbers, ["high", "low"]
    assert read("8, 5", "shift", names) == [8.0, 5.0] and read(5, "shift", names) == [5.0, 5.0]
    with pytest.raises(part("errors").NodeError, match="shift is one number, or one for each of high, low"):
        read("1, 2, 3", "shift", names)


def test_boundaries(part) -> None:
    read = part("widget_text").read_boundaries
    assert read("0.875") == [0.875] and read(0.9) == [0.9] and read("Half") == [None] and read("0.9, 1/2") == [0.9, 0.5]
    with pytest.raises(part("errors").NodeError, match=r"boundaries are sigmas with commas between \(0.875\)"):
        read("high")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a/models/loras/x y.safetensors: not a file of LoRAs", "not a file of LoRAs (x y.safetensors)"),
        ("C:\\models\\x.safetensors: damaged", "damaged (x.safetensors)"),
        ("x.safetensors of /a/b/c: does not load", "x.safetensors of c: does not load"),
        ("x.safetensors: no key fits", "no key fits (x.safetensors)"),
        ("get it at https://huggingface.co/a/b: now", "get it at https://huggingface.co/a/b: now"),
        ("steps are whole numbers", "steps are whole numbers"),
    ],
)
def test_errors_lead_with_their_sentence_and_name_files_alone(part, text: str, expected: str) -> None:
    assert part("errors").worded(text) == expected

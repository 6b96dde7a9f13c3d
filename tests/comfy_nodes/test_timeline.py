"""The time line as data, text and picture."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pdmd_core.phases import PhasePlan

PLAN = PhasePlan.from_steps([2, 2], shift=5.0)


def test_the_data_covers_the_noise_range_without_gaps(part) -> None:
    found = part("timeline").timeline(PLAN, [3.5, None])
    assert json.loads(json.dumps(found)) == found
    high, low = found["phases"]
    assert (high["start"], high["end"], low["start"], low["end"]) == (1.0, 5 / 6, 5 / 6, 0.0)
    assert (high["cfg"], low["cfg"], high["sigmas"]) == (3.5, None, [1.0, 0.9375])
    assert high["colour"] != low["colour"]


def test_the_report_names_the_expert_of_every_step_and_the_warnings(part) -> None:
    lines = part("timeline").report(PLAN, None, ["look out"], [None, 2.0]).splitlines()
    assert [line.split("expert ")[1] for line in lines[:4]] == ["high_noise"] * 2 + ["low_noise  cfg 2"] * 2
    assert lines[0].startswith("step 0  sigma 1.0000 to 0.9375  log-SNR -inf")
    assert lines[2].startswith("step 2  sigma 0.8333 to 0.6250  log-SNR -3.22")
    assert lines[4:] == ["2 phase(s), 4 trained step(s), shift 5", "Warning: look out"]


def pixels(picture) -> set[str]:
    flat = np.asarray(picture).reshape(-1, 3)
    return {f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in np.unique(flat, axis=0)}


@pytest.mark.parametrize("steps", [[1], [2, 2], [1, 1, 2], [1] * 9])
def test_the_picture_shows_every_phase_in_its_colour_in_proportion(part, steps: list[int]) -> None:
    timeline, plan = part("timeline"), PhasePlan.from_steps(steps, shift=3.0)
    picture = timeline.draw(plan, timeline.report(plan))
    row = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in np.asarray(picture)[30 + 4]]
    for k, phase in enumerate(timeline.timeline(plan)["phases"][: len(timeline.COLOURS)]):
        share = (phase["start"] - phase["end"]) * (960 - 72)
        same = [other for other in timeline.timeline(plan)["phases"] if other["colour"] == phase["colour"]]
        if len(same) == 1:
            assert abs(row.count(timeline.COLOURS[k]) - share) <= 2


def test_sigmas_of_a_run_and_warnings_stand_out(part) -> None:
    timeline = part("timeline")
    assert timeline._WARNING not in pixels(timeline.draw(PLAN, "all is well"))
    assert timeline._WARNING in pixels(timeline.draw(PLAN, "all is well", [1.0, 0.5, 0.0]))
    long = "Warning: " + "words " * 60
    assert timeline.draw(PLAN, long).height > timeline.draw(PLAN, "Warning: word").height


def test_names_without_room_end_in_an_ellipsis(part) -> None:
    timeline, name = part("timeline"), "undistilled"
    font = timeline._font(17)
    width = font.getlength(name)
    assert timeline._shortened(name, font, width) == name
    short = timeline._shortened(name, font, 0.6 * width)
    assert short.endswith("\u2026") and name.startswith(short[:-1]) and len(short) > 3
    assert font.getlength(short) <= 0.6 * width
    assert timeline._shortened(name, font, 1) == ""

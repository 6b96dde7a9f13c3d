"""The time line as data, words and picture."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pdmd_core.phases import PhasePlan


@pytest.fixture(scope="module")
def plans(part):
    """The plan classes of the pack."""
    import importlib

    name = part("timeline").PhasePlan.__module__
    return importlib.import_module(name).PhasePlan, importlib.import_module(
        name.replace("phases", "boundary_plan")
    ).BoundaryPlan


def plan_of(plans, steps=(2, 2), shift: float = 5.0) -> PhasePlan:
    return plans[0].from_steps(list(steps), shift=shift)


def test_the_data_has_a_step_for_each_cell_and_covers_the_noise_range(part, plans) -> None:
    found = part("timeline").timeline(plan_of(plans), [3.5, (None, 2.0)], strengths=[1.0, None])
    assert json.loads(json.dumps(found)) == found
    high, low = found["phases"]
    assert (high["start"], high["end"], low["start"], low["end"]) == (1.0, 5 / 6, 5 / 6, 0.0)
    assert high["colour"] != low["colour"] and (high["strength"], low["strength"]) == (1.0, None)
    assert [step["sigma"] for step in found["steps"]] == [1.0, 0.9375, 5 / 6, 0.625]
    assert [step["phase"] for step in found["steps"]] == [0, 0, 1, 1]
    assert [step["cfg"] for step in found["steps"]] == [3.5, 3.5, None, 2.0]
    assert all(step["trained"] and not step["skipped"] for step in found["steps"])


def test_a_run_shows_what_it_skips_and_what_was_not_trained(part, plans) -> None:
    timeline = part("timeline").timeline
    run = part("runs").Run([0.8333, 0.7, 0.0], [1.0, 0.9375], 0.5)
    described = timeline(plan_of(plans), None, run, note="what to do")
    assert (described["start"], described["note"]) == (0.5, "what to do")
    found = described["steps"]
    assert [step["skipped"] for step in found] == [True, True, False, False]
    assert [step["trained"] for step in found] == [True, True, True, False]
    undistilled = timeline(plans[1].at([0.875], 20, [5.0]))
    assert undistilled["any_steps"] and len(undistilled["steps"]) == 20
    assert all(step["trained"] for step in undistilled["steps"])


def test_the_report_leads_with_the_warnings_and_names_the_expert_of_every_step(part, plans) -> None:
    lines = part("timeline").report(plan_of(plans), None, ["look out"], [None, 2.0]).splitlines()
    assert lines[0] == "Warning: look out"
    assert lines[1].startswith("step 1  high_noise  sigma 1.0000  log-SNR -inf")
    assert lines[3].startswith("step 3  low_noise  sigma 0.8333  log-SNR -3.22  cfg 2")
    assert lines[5:] == ["2 phase(s), 4 trained step(s), shift 5"]
    last = part("timeline").report(plans[1].at([0.875], 20, [5.0])).splitlines()[-1]
    assert last == "2 phases, boundary 0.875, any number of steps, shift 5"


@pytest.mark.parametrize("steps", [[1], [2, 2], [1, 1, 2], [1] * 8])
def test_the_picture_has_cells_of_equal_width_in_the_colours_of_their_phases(part, plans, steps: list[int]) -> None:
    timeline, plan = part("timeline"), plan_of(plans, steps, 3.0)
    picture = np.asarray(timeline.draw(plan))
    assert picture.shape == (220, 1600, 3)
    row = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in picture[24]]
    share = (1600 - 32) / sum(steps)
    for k, count in enumerate(steps):
        assert abs(row.count(timeline.COLOURS[k]) - count * share) <= 4 * count


def pixels(picture) -> set[str]:
    flat = np.asarray(picture).reshape(-1, 3)
    return {f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in np.unique(flat, axis=0)}


def test_sigmas_that_were_not_trained_stand_out(part, plans) -> None:
    timeline, plan = part("timeline"), plan_of(plans)
    assert timeline._WARNING not in pixels(timeline.draw(plan))
    assert timeline._WARNING in pixels(timeline.draw(plan, [1.0, 0.5, 0.0]))


def test_names_without_room_end_in_an_ellipsis(part) -> None:
    timeline, name = part("timeline"), "undistilled"
    font = timeline._font(17)
    width = font.getlength(name)
    assert timeline._shortened(name, font, width) == name
    short = timeline._shortened(name, font, 0.6 * width)
    assert short.endswith("\u2026") and name.startswith(short[:-1]) and len(short) > 3
    assert font.getlength(short) <= 0.6 * width
    assert timeline._shortened(name, font, 1) == ""

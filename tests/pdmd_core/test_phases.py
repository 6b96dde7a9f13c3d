import dataclasses
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdmd_core.noise_level import shift_sigma
from pdmd_core.phases import (
    BOUNDARY_TOLERANCE,
    MAX_STEPS,
    Phase,
    PhasePlan,
    PhasePlanError,
)
from tests.helpers.phase_plans import plans

ROOT = Path(__file__).parents[2]


def through_thousand_in_float32(sigma: float) -> float:
    return float(np.float32(sigma * 1000) / np.float32(1000))


# Known plans


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        (5.0, [[1.0, 0.9375], [0.83333, 0.625]]),
        (7.0, [[1.0, 0.95455], [0.875, 0.7]]),
        (3.0, [[1.0, 0.9], [0.75, 0.5]]),
        (1.0, [[1.0, 0.75], [0.5, 0.25]]),
    ],
    ids=["wan shift 5", "wan shift 7", "qwen-image shift 3", "no shift"],
)
def test_known_four_step_plans_come_out_exactly(shift, expected):
    plan = PhasePlan.from_steps([2, 2], shift=shift)
    assert [[round(sigma, 5) for sigma in phase.sigmas] for phase in plan.phases] == expected
    assert plan.boundaries == (plan.phases[1].sigmas[0],)
    assert [round(sigma, 5) for sigma in plan.boundaries] == [expected[1][0]]


def test_exact_fractions_of_the_wan_plan():
    assert PhasePlan.from_steps([2, 2], shift=5.0).sigmas == pytest.approx((1, 15 / 16, 5 / 6, 5 / 8), rel=1e-15)


def test_default_names_follow_the_number_of_phases():
    assert [p.name for p in PhasePlan.from_steps([1]).phases] == ["all_noise"]
    assert [p.name for p in PhasePlan.from_steps([2, 2]).phases] == ["high_noise", "low_noise"]
    assert [p.name for p in PhasePlan.from_steps([1, 1, 1]).phases] == ["high_noise", "middle_noise", "low_noise"]
    assert [p.name for p in PhasePlan.from_steps([1] * 4).phases] == ["phase_0", "phase_1", "phase_2", "phase_3"]


@pytest.mark.parametrize("count", range(1, 7))
def test_one_to_six_phases_are_plans(count):
    plan = PhasePlan.from_steps([2] * count, shift=5.0)
    assert len(plan) == len(plan.phases) == count
    assert len(plan.sigmas) == 2 * count
    assert len(plan.boundaries) == count - 1
    assert [plan.phase_index(sigma) for sigma in plan.sigmas] == [k for k in range(count) for _ in range(2)]


def test_phases_may_have_different_numbers_of_steps():
    plan = PhasePlan.from_steps([1, 3, 2], shift=1.0, names=["a", "b", "c"])
    assert plan.phases == (
        Phase("a", (1.0,)),
        Phase("b", (pytest.approx(5 / 6), pytest.approx(4 / 6), 0.5)),
        Phase("c", (pytest.approx(2 / 6), pytest.approx(1 / 6))),
    )


# Intervals and routing


@given(plans())
def test_intervals_tile_the_noise_range_without_gap_or_overlap(plan):
    intervals = [plan.interval(k) for k in range(len(plan))]
    assert intervals[0][1] == 1
    assert intervals[-1][0] == 0
    for (end, _), (_, next_start) in pairwise(intervals):
        assert end == next_start
    assert all(end < start for end, start in intervals)


@given(plans(), st.floats(0, 1, exclude_min=True))
def test_every_sigma_routes_to_the_one_interval_that_holds_it(plan, sigma):
    owners = [k for k in range(len(plan)) if plan.interval(k)[0] < sigma <= plan.interval(k)[1]]
    assert len(owners) == 1
    if all(abs(sigma / boundary - 1) > 2 * BOUNDARY_TOLERANCE for boundary in plan.boundaries):
        assert plan.phase_index(sigma) == owners[0]


@given(plans())
def test_every_sigma_of_a_plan_routes_to_its_own_phase(plan):
    for k, phase in enumerate(plan.phases):
        assert [plan.phase_index(sigma) for sigma in phase.sigmas] == [k] * len(phase.sigmas)


@given(plans())
def test_a_boundary_routes_to_the_later_phase(plan):
    assert [plan.phase_index(boundary) for boundary in plan.boundaries] == list(range(1, len(plan)))


@given(plans())
def test_a_boundary_a_little_too_high_still_routes_to_the_later_phase(plan):
    nudged = [boundary * (1 + 5e-5) for boundary in plan.boundaries]
    assert [plan.phase_index(sigma) for sigma in nudged] == list(range(1, len(plan)))


@given(plans())
def test_sigma_beyond_the_tolerance_above_a_boundary_routes_to_the_earlier_phase(plan):
    above = [boundary * (1 + 3e-4) for boundary in plan.boundaries]
    assert [plan.phase_index(sigma) for sigma in above] == list(range(len(plan) - 1))


@given(plans())
def test_routing_survives_timesteps_in_float32(plan):
    for sigma in plan.sigmas:
        assert plan.phase_index(through_thousand_in_float32(sigma)) == plan.phase_index(sigma)
        assert plan.phase_index(float(np.float32(sigma))) == plan.phase_index(sigma)


def test_rounding_above_one_is_still_the_first_phase():
    assert PhasePlan.from_steps([2, 2]).phase_index(1 + 5e-5) == 0


# Values


@given(plans())
def test_sigmas_descend_over_the_whole_plan(plan):
    assert plan.sigmas[0] == 1
    assert all(high > low > 0 for high, low in zip(plan.sigmas, plan.sigmas[1:], strict=False))


@given(plans())
def test_json_round_trip_is_identity_and_keeps_the_hash(plan):
    again = PhasePlan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert PhasePlan.from_dict(plan.to_dict()) == plan


def test_json_form_is_the_documented_one():
    plan = PhasePlan.from_sigmas([[1.0, 0.9], [0.75]], ["first", "second"])
    assert json.loads(plan.to_json()) == {
        "phases": [{"name": "first", "sigmas": [1.0, 0.9]}, {"name": "second", "sigmas": [0.75]}]
    }


def test_whole_numbers_in_json_are_sigmas():
    assert PhasePlan.from_json('{"phases": [{"name": "a", "sigmas": [1]}]}') == PhasePlan.from_sigmas([[1.0]], ["a"])


def test_plans_that_differ_in_name_or_sigma_are_not_equal():
    plan = PhasePlan.from_sigmas([[1.0], [0.5]], ["a", "b"])
    assert plan != PhasePlan.from_sigmas([[1.0], [0.5]], ["a", "c"])
    assert plan != PhasePlan.from_sigmas([[1.0], [0.4]], ["a", "b"])
    assert plan != PhasePlan.from_sigmas([[1.0, 0.5]], ["a"])


def test_plans_are_immutable():
    plan = PhasePlan.from_steps([2, 2])
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.phases = ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.phases[0].name = "other"
    with pytest.raises(TypeError):
        plan.phases[0].sigmas[0] = 0.5


def test_changing_the_dictionary_form_leaves_the_plan_alone():
    plan = PhasePlan.from_steps([2, 2])
    plan.to_dict()["phases"][0]["sigmas"].append(0.0)
    assert plan == PhasePlan.from_steps([2, 2])


# Shift


@given(st.lists(st.integers(1, 3), min_size=1, max_size=6).filter(lambda s: sum(s) > 1), st.floats(0.2, 12))
def test_shift_of_a_plan_is_the_shift_it_was_made_with(steps, shift):
    assert PhasePlan.from_steps(steps, shift=shift).shift == pytest.approx(shift, rel=1e-9)


def test_shift_is_one_for_a_single_step():
    assert PhasePlan.from_sigmas([[1.0]]).shift == 1


@pytest.mark.parametrize("sigmas", [[[1.0, 0.9], [0.75, 0.4]], [[1.0], [0.9], [0.1]]])
def test_shift_is_none_when_no_shift_makes_the_steps_uniform(sigmas):
    assert PhasePlan.from_sigmas(sigmas).shift is None


def test_importing_phases_needs_neither_torch_nor_matplotlib():
    code = "import sys, pdmd_core.phases; print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# Refinement


@given(plans(), st.integers(0, 9))
def test_refining_adds_steps_inside_phases_and_keeps_the_trained_ones(plan, more):
    steps = len(plan.sigmas) + more
    try:
        refined = plan.refined(steps)
    except PhasePlanError as error:
        assert "by at least 0.1 %" in str(error)  # a gap of the plan was too narrow for another sigma
        return
    assert len(refined.sigmas) == steps
    assert refined.boundaries == plan.boundaries
    assert set(plan.sigmas) <= set(refined.sigmas)
    assert [phase.name for phase in refined.phases] == [phase.name for phase in plan.phases]
    for k in range(len(plan)):
        assert refined.interval(k) == plan.interval(k)
        assert all(plan.phase_index(sigma) == k for sigma in refined.phases[k].sigmas)


def test_refining_is_uniform_in_raw_time_and_starts_at_the_noisy_end():
    plan = PhasePlan.from_steps([2, 2], shift=5.0)
    assert plan.refined(8).sigmas == pytest.approx(PhasePlan.from_steps([4, 4], shift=5.0).sigmas, abs=1e-12)
    assert plan.refined(5).phases[0].sigmas == pytest.approx((1.0, shift_sigma(0.875, 5.0), 0.9375))
    assert plan.refined(5).phases[1] == plan.phases[1]
    assert plan.refined(4) == plan
    uneven = PhasePlan.from_sigmas([[1.0, 0.9], [0.3]]).refined(5)
    assert uneven.sigmas == pytest.approx((1.0, 0.9, 0.7, 0.5, 0.3))


def test_a_plan_may_have_just_as_many_steps_as_are_allowed() -> None:
    assert len(PhasePlan.from_steps([500, 500]).sigmas) == MAX_STEPS
    assert len(PhasePlan.from_steps([2]).refined(MAX_STEPS).sigmas) == MAX_STEPS


def test_a_plan_that_is_almost_uniform_has_no_shift() -> None:
    uniform = [list(phase.sigmas) for phase in PhasePlan.from_steps([2, 2], shift=5.0).phases]
    uniform[1][1] *= 1.01
    assert PhasePlan.from_sigmas(uniform).shift is None

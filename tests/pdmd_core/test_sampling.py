"""Sigmas of a run, and warnings about sigmas from elsewhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdmd_core.phases import PhasePlan, PhasePlanError
from pdmd_core.sampling import sampling_sigmas, sigma_warnings

WAN = PhasePlan.from_steps([2, 2], shift=5.0)
PLANS = st.builds(
    PhasePlan.from_steps,
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.floats(0.5, 12),
)


def test_a_whole_run_has_the_sigmas_of_the_plan_and_ends_at_zero() -> None:
    assert sampling_sigmas(WAN) == [*WAN.sigmas, 0.0]
    assert sampling_sigmas(WAN, steps=7) == [*WAN.refined(7).sigmas, 0.0]


@pytest.mark.parametrize(
    ("denoise", "steps"), [(1.0, 4), (0.9, 4), (0.87, 3), (0.75, 3), (0.6, 2), (0.5, 2), (0.3, 1), (0.01, 1), (0.0, -1)]
)
def test_denoise_starts_at_the_nearest_step_of_the_plan(denoise: float, steps: int) -> None:
    assert sampling_sigmas(WAN, denoise=denoise) == [*WAN.sigmas, 0.0][4 - steps :]


def test_denoise_without_a_shift_is_in_sigma() -> None:
    plan = PhasePlan.from_sigmas([[1.0, 0.9], [0.6, 0.55]])
    assert plan.shift is None
    assert sampling_sigmas(plan, denoise=0.7) == [0.6, 0.55, 0.0]


@pytest.mark.parametrize("denoise", [-0.1, 1.1, float("nan"), "1"])
def test_denoise_out_of_range(denoise: float) -> None:
    with pytest.raises(PhasePlanError, match=r"denoise is a number in \[0, 1\]"):
        sampling_sigmas(WAN, denoise=denoise)


@given(PLANS, st.floats(0.01, 1))
def test_the_plans_own_sigmas_are_never_warned_about(plan: PhasePlan, denoise: float) -> None:
    assert sigma_warnings(plan, sampling_sigmas(plan, denoise=denoise)) == []


@pytest.mark.parametrize(
    ("sigmas", "messages"),
    [
        (
            [1.0, 0.9097, 0.7173, 0.0244, 0.0],
            ["step 1 is at sigma 0.9097, where expert high_noise", "step 2", "step 3"],
        ),
        ([1.0, 0.9375, 0.625, 0.0], ["the step from 0.9375 to 0.6250 jumps over the boundary 0.8333"]),
        ([1.0, 0.9375, 0.0], ["jumps over the boundary", "no step runs expert low_noise"]),
        ([1.0, 0.9375, 0.8333], []),
        ([0.625, 0.0], []),
        ([1.0], ["at least two numbers, found 1"]),
        ([14.6, 3.0, 0.0], ["lie in [0, 1], found 14.6"]),
        ([0.0, 0.5, 1.0], ["descend, these do not"]),
    ],
)
def test_what_is_wrong_is_said(sigmas: list[float], messages: list[str]) -> None:
    found = sigma_warnings(WAN, sigmas)
    for message in messages:
        assert any(message in warning for warning in found), found
    assert bool(found) == bool(messages)

"""Plans of undistilled bases: a boundary, any number of steps."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pdmd_core.boundary_plan import WAN22_BOUNDARIES, BoundaryPlan
from pdmd_core.noise_level import shift_sigma
from pdmd_core.phases import PhasePlanError
from pdmd_core.sampling import sampling_sigmas, sigma_warnings


@pytest.mark.parametrize("boundary", WAN22_BOUNDARIES.values(), ids=WAN22_BOUNDARIES)
@pytest.mark.parametrize("steps", [4, 7, 20, 40])
def test_a_run_is_uniform_in_raw_time_and_no_sigma_is_wrong(boundary: float | None, steps: int) -> None:
    plan = BoundaryPlan.at([boundary], 20, [12.0])
    sigmas = sampling_sigmas(plan, steps)
    assert sigmas == pytest.approx([shift_sigma(1 - n / steps, 12.0) for n in range(steps)] + [0.0])
    assert sigma_warnings(plan, sigmas) == [] and len(sampling_sigmas(plan)) == 21
    expected = shift_sigma(0.5, 12.0) if boundary is None else boundary
    assert plan.boundaries == (pytest.approx(expected),)
    owners = [plan.phase_index(sigma) for sigma in sigmas[:-1]]
    assert owners == [int(sigma <= expected) for sigma in sigmas[:-1]]
    if boundary is None and steps % 2 == 0:
        assert owners.count(0) == steps // 2


def test_a_shift_for_each_phase() -> None:
    plan = BoundaryPlan.at([0.9], 20, [8.0, 3.0], ["above", "below"])
    sigmas = plan.schedule()
    assert plan.shift is None and all(high > low for high, low in pairwise(sigmas))
    for k, shift in enumerate((8.0, 3.0)):
        own = [sigma for sigma in sigmas[:-1] if plan.phase_index(sigma) == k]
        assert own == [s for n in range(20) if plan.phase_index(s := shift_sigma(1 - n / 20, shift)) == k]


def test_denoise_starts_at_the_nearest_step() -> None:
    plan = BoundaryPlan.at([0.875], 20, [5.0])
    assert sampling_sigmas(plan, denoise=0.25) == plan.schedule()[15:]


def test_an_expert_that_never_runs_and_sigmas_that_do_not_descend_are_said() -> None:
    plan = BoundaryPlan.at([0.875], 20, [1.0])
    assert sigma_warnings(plan, [1.0, 0.9, 0.0]) == ["no step runs expert low_noise"]
    assert "descend" in sigma_warnings(plan, [0.5, 0.7, 0.0])[0]


@pytest.mark.parametrize(
    ("boundaries", "steps", "shifts", "message"),
    [
        ([0.9], 1, [1.0], "steps are a whole number from 2"),
        ([0.9], 20, [1.0, 2.0, 3.0], "one for each of 2 phases"),
        ([0.9], 20, [0.0], "one positive number"),
        ([1.2], 20, [1.0], r"sigmas are numbers in \(0, 1\]"),
        ([0.5, 0.9], 20, [1.0], "must descend"),
    ],
)
def test_what_is_no_plan_is_one_line(boundaries: list[float], steps: int, shifts: list[float], message: str) -> None:
    with pytest.raises(PhasePlanError, match=message):
        BoundaryPlan.at(boundaries, steps, shifts)
    with pytest.raises(PhasePlanError, match="steps are a whole number"):
        BoundaryPlan.at([0.9], 20, [1.0]).schedule(0)

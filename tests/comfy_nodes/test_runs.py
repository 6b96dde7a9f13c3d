"""Where a run with a denoise below 1 starts."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def plan(part):
    return part("timeline").PhasePlan.from_steps([2, 2], 5.0)


@pytest.mark.parametrize(
    ("denoise", "start", "steps"),
    [(1.0, None, 4), (0.97, None, 4), (0.75, 0.75, 3), (0.5, 0.5, 2), (0.3, 0.25, 1), (0.25, 0.25, 1), (0.2, 0.25, 1)],
)
def test_a_run_starts_at_a_trained_step_that_is_near(part, plan, denoise: float, start: float, steps: int) -> None:
    run = part("runs").run_of(plan, 0, denoise)
    assert run.start == pytest.approx(start) if start else run.start is None
    assert len(run.sigmas) == steps + 1 and (*run.skipped, *run.sigmas[:-1]) == plan.sigmas


@pytest.mark.parametrize("denoise", [0.01, 0.05, 0.1, 0.15, 0.4, 0.6, 0.9])
def test_a_run_starts_between_trained_steps_where_none_is_near(part, plan, denoise: float) -> None:
    runs = part("runs")
    run = runs.run_of(plan, 0, denoise)
    assert abs(run.start - denoise) <= runs.NEAR + 1e-6
    whole = [*run.skipped, *run.sigmas[:-1]]
    assert tuple(whole) == plan.refined(len(whole)).sigmas and set(plan.sigmas) <= set(whole)
    assert abs(runs.run_of(plan, len(whole) - 1, denoise).start - denoise) <= runs.NEAR + 1e-6


def test_a_gentle_run_is_gentle(part, plan) -> None:
    run = part("runs").run_of(plan, 0, 0.1)
    assert run.sigmas == pytest.approx([5 / 12, 0.0]) and run.start == pytest.approx(0.125)


def test_nothing_is_sampled_without_denoise_and_any_boundary_plan_is_fine(part, plan) -> None:
    run = part("runs").run_of(plan, 0, 0.0)
    assert run.sigmas == [] and run.skipped == list(plan.sigmas)
    import importlib

    boundary = importlib.import_module(type(plan).__module__.replace("phases", "boundary_plan")).BoundaryPlan
    run = part("runs").run_of(boundary.at([0.875], 20, [5.0]), 0, 0.3)
    assert run.start == pytest.approx(0.3) and len(run.sigmas) == 7


def test_steps_that_cannot_be_say_what_to_do(part, plan) -> None:
    for steps, message in ((2, "at least the 4 that the experts were trained for"), (400, "take fewer, or 0")):
        with pytest.raises(part("errors").NodeError, match=message):
            part("runs").run_of(plan, steps, 1.0)
    with pytest.raises(ValueError, match="denoise is a number"):
        part("runs").run_of(plan, 8, 2.0)

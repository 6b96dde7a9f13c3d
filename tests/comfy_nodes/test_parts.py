"""Strengths that change inside of a phase."""

from __future__ import annotations


def test_a_phase_is_divided_where_its_strength_changes(part) -> None:
    plan = part("timeline").PhasePlan.from_steps([2, 3], 5.0)
    made = part("parts").in_parts(plan, [(1.0, 0.9), (0.8, 0.8, 1.0)], [(3.5, 2.0), 1.0], [0.5, 0.25])
    assert [phase.name for phase in made.plan.phases] == ["high_noise_1", "high_noise_2", "low_noise_1", "low_noise_2"]
    assert made.plan.sigmas == plan.sigmas
    assert (made.phases, made.strengths) == ([0, 0, 1, 1], [0.5, 0.45, 0.2, 0.25])
    assert made.cfgs == [3.5, 2.0, 1.0, 1.0]


def test_a_plan_whose_phases_each_have_one_strength_stays_itself(part) -> None:
    plan = part("timeline").PhasePlan.from_steps([2, 2], 5.0)
    made = part("parts").in_parts(plan, [(0.9, 0.9), 1.0], [(3.5, None), None])
    assert made.plan is plan and made.strengths == [0.9, 1.0] and made.cfgs == [(3.5, None), None]

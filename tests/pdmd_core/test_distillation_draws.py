"""Steps and noise levels that a distiller draws."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdmd_core.batch import Renoising
from pdmd_core.distillation import PhasedDistiller
from pdmd_core.method import Objective
from pdmd_core.noise_level import unshift_sigma
from pdmd_core.phases import PhasePlan
from tests.helpers.tiny_networks import (
    BATCH,
    PLAN,
    POSITIVE,
    START,
    TinyNetworks,
    distiller,
    every_phase,
    normal,
)

plans = st.builds(PhasePlan.from_steps, st.lists(st.integers(1, 3), min_size=1, max_size=6), shift=st.floats(0.5, 12.0))


@st.composite
def plans_with_phase(draw) -> tuple[PhasePlan, int]:
    plan = draw(plans)
    return plan, draw(st.integers(0, len(plan) - 1))


def drawing(plan: PhasePlan, phase: int, **choices) -> PhasedDistiller:
    return PhasedDistiller(plan, phase, TinyNetworks(), Objective(**choices))


score_shifts = st.floats(0.5, 12.0)
weightings = st.sampled_from(["clamp", "none", "margin"])


@given(plans_with_phase(), score_shifts, weightings, st.integers(0, 99))
def test_nested_scores_are_compared_between_the_end_of_the_phase_and_one(where, shift, weighting, seed):
    plan, phase = where
    method = drawing(plan, phase, score_shift=shift, fake_weighting=weighting)
    t = method.draw_score_sigma(64, torch.Generator().manual_seed(seed))
    assert t.shape == (64,)
    assert plan.interval(phase)[0] < t.min().item()
    assert t.max().item() < 1


@given(plans_with_phase(), score_shifts, weightings, st.integers(0, 99))
def test_disjoint_scores_are_compared_inside_the_phase(where, shift, weighting, seed):
    plan, phase = where
    method = drawing(plan, phase, score_shift=shift, fake_weighting=weighting, score_range="disjoint")
    t = method.draw_score_sigma(64, torch.Generator().manual_seed(seed))
    end, start = plan.interval(phase)
    assert end < t.min().item()
    assert t.max().item() < start


@given(plans_with_phase(), score_shifts, st.floats(0, 0.5), st.sampled_from(["nested", "disjoint"]))
def test_margin_keeps_scores_away_from_the_end_of_the_phase(where, shift, margin, score_range):
    plan, phase = where
    method = drawing(plan, phase, score_shift=shift, fake_weighting="margin", margin=margin, score_range=score_range)
    end, start = plan.interval(phase)
    low = unshift_sigma(end, shift)
    high = unshift_sigma(start, shift) if score_range == "disjoint" else 1.0
    raw = [unshift_sigma(t, shift) for t in method.draw_score_sigma(64).tolist()]
    assert min(raw) >= low + margin * (high - low) - 1e-6


@pytest.mark.parametrize("weighting", ["clamp", "none"])
def test_margin_matters_only_to_its_own_weighting(weighting):
    method = drawing(PLAN, 1, fake_weighting=weighting, margin=0.9)
    assert method.draw_score_sigma(200).min().item() < PLAN.interval(1)[0] + 0.1


@pytest.mark.parametrize("weighting", ["clamp", "margin"])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_extreme_draws_stay_inside_the_range(monkeypatch, weighting, uniform):
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, uniform, dtype=torch.float64))
    for phase, score_range in product(range(len(PLAN)), ["nested", "disjoint"]):
        method = drawing(PLAN, phase, fake_weighting=weighting, margin=0.0, score_range=score_range)
        t = method.draw_score_sigma(1).item()
        end, start = PLAN.interval(phase)
        assert end < t < (start if score_range == "disjoint" else 1)


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("score_range", ["nested", "disjoint"])
def test_score_levels_are_uniform_in_raw_time_under_their_shift(shift, score_range):
    method = drawing(PLAN, 1, score_shift=shift, score_range=score_range)
    count = 5000
    raw = torch.tensor([unshift_sigma(t, shift) for t in method.draw_score_sigma(count).tolist()])
    end, start = PLAN.interval(1)
    low, high = unshift_sigma(end, shift), unshift_sigma(start, shift) if score_range == "disjoint" else 1.0
    quantiles = (raw.sort().values - low) / (high - low)
    expected = (torch.arange(count) + 0.5) / count
    assert (quantiles - expected).abs().max() < 2 / count**0.5


def test_score_levels_repeat_with_the_generator():
    method = drawing(PLAN, 1)
    first, again, other = (method.draw_score_sigma(8, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert first.tolist() == again.tolist() != other.tolist()


OUTSIDE = {
    "nested at the end of the phase": ("nested", PLAN.interval(1)[0]),
    "nested below the end of the phase": ("nested", PLAN.interval(1)[0] - 0.01),
    "nested above one": ("nested", 1.01),
    "nested not a number": ("nested", float("nan")),
    "disjoint below the end of the phase": ("disjoint", PLAN.interval(1)[0] - 0.01),
    "disjoint above the start of the phase": ("disjoint", PLAN.interval(1)[1] + 1e-4),
}


@pytest.mark.parametrize(("score_range", "level"), OUTSIDE.values(), ids=OUTSIDE)
def test_a_score_level_outside_the_range_is_a_one_line_error(score_range, level):
    method, networks = distiller(1, score_range=score_range)
    t = torch.full((BATCH,), PLAN.interval(1)[0] + 0.001)
    t[2] = level
    rollout = method.expert_rollout(START, 0)
    networks.calls.clear()
    for loss in (
        lambda: method.fake_loss(rollout.x_s, POSITIVE, Renoising(t, normal(2))),
        lambda: method.generator_loss(rollout, START, Renoising(t, normal(2))),
    ):
        with pytest.raises(ValueError, match="'second' compares scores at sigmas in") as caught:
            loss()
        assert "\n" not in str(caught.value)
        assert f"({method.sigma_end}, " in str(caught.value)
    assert networks.calls == []


@every_phase
def test_every_step_of_the_phase_is_drawn_equally_often(phase):
    method, _ = distiller(phase)
    generator = torch.Generator().manual_seed(0)
    counts = Counter(method.draw_step(generator) for _ in range(600))
    steps = len(PLAN.phases[phase].sigmas)
    assert sorted(counts) == list(range(steps))
    assert all(abs(count - 600 / steps) < 75 for count in counts.values())


def test_steps_repeat_with_the_generator_that_all_ranks_share():
    method, _ = distiller(1)
    ranks = [torch.Generator().manual_seed(5) for _ in range(2)]
    draws = [[method.draw_step(generator) for _ in range(20)] for generator in ranks]
    assert draws[0] == draws[1]

from collections import Counter
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pdmd_core.distillation import (
    Batch,
    Objective,
    PhasedDistiller,
    Renoising,
    evaluations_per_update,
    guided_velocity,
)
from pdmd_core.families.base import classifier_free_guidance
from pdmd_core.flow import renoise, velocity_to_x0
from pdmd_core.noise_level import unshift_sigma
from pdmd_core.objectives import RenoisedSamples, fake_score_loss, generator_direction
from pdmd_core.phases import PhasePlan

PLAN = PhasePlan.from_steps([2, 3, 1], shift=5.0, names=["first", "second", "third"])
ROLES = ["teacher", "first", "second", "third", "fake"]
every_phase = pytest.mark.parametrize("phase", range(len(PLAN)))
BATCH, FEATURES = 4, 3


@dataclass
class Call:
    role: str
    x: Tensor
    sigma: float | Tensor
    conditioning: dict[str, Tensor]
    recorded: bool
    """Whether autograd records the evaluation."""


class TinyNetworks:
    """One small linear network for each role, all of them trainable: only routing decides what gets gradient."""

    guide = staticmethod(classifier_free_guidance)

    def __init__(self) -> None:
        torch.manual_seed(7)
        self.networks = {role: nn.Linear(2 * FEATURES + 1, FEATURES).double() for role in ROLES}
        self.calls: list[Call] = []

    def velocity(self, role, x, sigma, conditioning):
        column = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x)).reshape(-1, 1)
        velocity = self.networks[role](torch.cat([x, column, conditioning["prompt"]], dim=1))
        self.calls.append(Call(role, x, sigma, conditioning, velocity.requires_grad))
        return velocity

    def roles_with_gradient(self) -> set[str]:
        return {
            role
            for role, network in self.networks.items()
            if any(p.grad is not None and bool(p.grad.any()) for p in network.parameters())
        }


def prompt(value: float) -> dict[str, Tensor]:
    return {"prompt": torch.full((BATCH, FEATURES), value, dtype=torch.float64)}


POSITIVE, NEGATIVE = prompt(1.0), prompt(-0.5)


def normal(seed: int) -> Tensor:
    return torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


START = Batch(normal(1), POSITIVE, NEGATIVE)


def distiller(phase: int, **choices) -> tuple[PhasedDistiller, TinyNetworks]:
    networks = TinyNetworks()
    return PhasedDistiller(PLAN, phase, networks, Objective(**choices)), networks


def generator_update(method: PhasedDistiller, step: int = 0):
    rollout = method.rollout(START, step, gradient=True)
    t = method.draw_score_sigma(BATCH, torch.Generator().manual_seed(2))
    return rollout, t, method.generator_loss(rollout, START, Renoising(t, normal(3)))


# Which role gets gradient from which loss


@every_phase
def test_fake_loss_reaches_only_the_fake(phase):
    method, networks = distiller(phase)
    rollout = method.rollout(START, 0, gradient=True)
    method.fake_loss(rollout.x_s, POSITIVE, Renoising(method.draw_score_sigma(BATCH), normal(2))).backward()
    assert networks.roles_with_gradient() == {"fake"}


@every_phase
@pytest.mark.parametrize("weighting", ["dmd2", "paper"])
def test_generator_loss_reaches_only_the_expert_of_the_phase(phase, weighting):
    method, networks = distiller(phase, generator_weighting=weighting)
    generator_update(method)[2].loss.backward()
    assert networks.roles_with_gradient() == {["first", "second", "third"][phase]} == {method.expert}


@torch.no_grad()
@every_phase
def test_the_score_distance_is_how_far_teacher_and_fake_are_apart(phase):
    method, networks = distiller(phase)
    rollout, t, found = generator_update(method)
    samples = RenoisedSamples(rollout.x_s, normal(3), method.sigma_end, t)
    teacher = method.teacher_velocity(samples, START)
    expected = (teacher - networks.velocity("fake", samples.x_t, t, POSITIVE)).abs().mean()
    torch.testing.assert_close(found.score_distance, expected.float())
    assert not found.score_distance.requires_grad


@every_phase
def test_generator_update_records_exactly_one_evaluation(phase):
    for step in range(len(PLAN.phases[phase].sigmas)):
        method, networks = distiller(phase)
        generator_update(method, step)
        recorded = [(call.role, call.sigma) for call in networks.calls if call.recorded]
        assert recorded == [(method.expert, PLAN.phases[phase].sigmas[step])]


@every_phase
def test_fake_update_records_exactly_one_evaluation(phase):
    method, networks = distiller(phase)
    rollout = method.rollout(START, 0, gradient=False)
    method.fake_loss(rollout.x_s, POSITIVE, Renoising(method.draw_score_sigma(BATCH), normal(2)))
    assert [call.role for call in networks.calls if call.recorded] == ["fake"]


@every_phase
def test_no_network_is_asked_outside_its_interval(phase):
    method, networks = distiller(phase)
    for step in range(len(PLAN.phases[phase].sigmas)):
        rollout, t, _ = generator_update(method, step)
        method.fake_loss(rollout.x_s, POSITIVE, Renoising(t, normal(4)))
    asked = set()
    for call in networks.calls:
        asked.add(call.role)
        if call.role in ("teacher", "fake"):
            assert bool(((call.sigma > method.sigma_end) & (call.sigma < 1)).all())
        else:
            end, start = PLAN.interval(["first", "second", "third"].index(call.role))
            assert end < call.sigma <= start
    assert asked == {"teacher", "fake", *["first", "second", "third"][: phase + 1]}


# The losses are those of the objectives, at the right place


@every_phase
@pytest.mark.parametrize("target", ["unbiased", "biased"])
@pytest.mark.parametrize("weighting", ["clamp", "none"])
def test_fake_loss_is_score_matching_at_the_renoised_samples(phase, target, weighting):
    method, networks = distiller(phase, fake_target=target, fake_weighting=weighting)
    x_s, noise, t = normal(1), normal(2), method.draw_score_sigma(BATCH)
    loss = method.fake_loss(x_s, POSITIVE, Renoising(t, noise))
    (call,) = networks.calls
    s = PLAN.interval(phase)[0]
    assert call.role == "fake"
    assert call.conditioning is POSITIVE
    torch.testing.assert_close(call.x, renoise(x_s, noise, s, t))
    torch.testing.assert_close(call.sigma, t)
    with torch.no_grad():
        velocity = networks.velocity("fake", call.x, t, POSITIVE)
    torch.testing.assert_close(
        loss, fake_score_loss(velocity, RenoisedSamples(x_s, noise, s, t), weighting, target).mean()
    )


@every_phase
@pytest.mark.parametrize("weighting", ["dmd2", "paper"])
def test_generator_loss_has_the_weighted_direction_as_gradient_of_the_samples(phase, weighting):
    method, networks = distiller(phase, generator_weighting=weighting, guidance_scale=3.0)
    s, noise, t = PLAN.interval(phase)[0], normal(3), method.draw_score_sigma(BATCH)
    rollout = method.rollout(START, 0, gradient=True)
    leaf = replace(rollout, x_s=rollout.x_s.detach().requires_grad_())
    method.generator_loss(leaf, START, Renoising(t, noise)).loss.backward()
    with torch.no_grad():
        x_t = renoise(rollout.x_s, noise, s, t)
        positive = networks.velocity("teacher", x_t, t, POSITIVE)
        negative = networks.velocity("teacher", x_t, t, NEGATIVE)
        fake = networks.velocity("fake", x_t, t, POSITIVE)
        teacher = negative + 3.0 * (positive - negative)
        samples = RenoisedSamples(rollout.x_s, noise, s, t)
        expected = generator_direction(samples, teacher, fake, weighting, rollout.x0)
    torch.testing.assert_close(leaf.x_s.grad, expected / (BATCH * FEATURES))


def test_rollout_uses_the_conditioning_and_the_weights_of_each_expert():
    method, networks = distiller(1)
    rollout = method.rollout(START, 1, gradient=False)
    assert [(c.role, c.sigma) for c in networks.calls] == [
        ("first", PLAN.sigmas[0]),
        ("first", PLAN.sigmas[1]),
        ("second", PLAN.sigmas[2]),
        ("second", PLAN.sigmas[3]),
    ]
    assert all(call.conditioning is POSITIVE for call in networks.calls)
    last = networks.calls[-1]
    with torch.no_grad():
        velocity = networks.velocity("second", last.x, last.sigma, POSITIVE)
    torch.testing.assert_close(rollout.x_s, last.x + (PLAN.boundaries[1] - PLAN.sigmas[3]) * velocity)
    torch.testing.assert_close(rollout.x0, velocity_to_x0(last.x, velocity, last.sigma))


# Guidance


@pytest.mark.parametrize("sigma", [0.7, torch.tensor(0.7), torch.tensor([0.2, 0.5, 0.7, 0.9])], ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
@pytest.mark.parametrize(("batched", "sizes"), [(True, [2 * BATCH]), (False, [BATCH, BATCH])])
def test_guidance_is_the_formula_of_two_separate_evaluations(sigma, scale, batched, sizes):
    networks = TinyNetworks()
    found = guided_velocity(networks, normal(1), sigma, POSITIVE, NEGATIVE, scale, batched)
    assert [len(call.x) for call in networks.calls] == sizes
    positive = networks.velocity("teacher", normal(1), sigma, POSITIVE)
    negative = networks.velocity("teacher", normal(1), sigma, NEGATIVE)
    torch.testing.assert_close(found, negative + scale * (positive - negative))


@pytest.mark.parametrize("batched", [True, False])
def test_the_generator_loss_asks_the_teacher_as_the_distiller_was_told(batched):
    networks = TinyNetworks()
    generator_update(PhasedDistiller(PLAN, 0, networks, Objective(), batched))
    assert [len(c.x) for c in networks.calls if c.role == "teacher"] == ([2 * BATCH] if batched else [BATCH, BATCH])


def test_guidance_of_one_evaluates_the_teacher_once_without_the_negative():
    networks = TinyNetworks()
    found = guided_velocity(networks, normal(1), 0.7, POSITIVE, NEGATIVE, 1.0)
    assert [(call.role, len(call.x)) for call in networks.calls] == [("teacher", BATCH)]
    torch.testing.assert_close(found, networks.velocity("teacher", normal(1), 0.7, POSITIVE))


def test_guidance_of_half_precision_networks_is_computed_in_float32():
    class Half(TinyNetworks):
        def velocity(self, role, x, sigma, conditioning):
            return super().velocity(role, x, sigma, conditioning).bfloat16()

    networks = Half()
    found = guided_velocity(networks, normal(1), 0.7, POSITIVE, NEGATIVE, 4.3)
    positive = networks.velocity("teacher", normal(1), 0.7, POSITIVE).float()
    negative = networks.velocity("teacher", normal(1), 0.7, NEGATIVE).float()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, negative + 4.3 * (positive - negative), rtol=0, atol=0)


def test_only_the_teacher_is_guided():
    method, networks = distiller(1, guidance_scale=4.0)
    generator_update(method)
    assert {call.role for call in networks.calls if len(call.x) != BATCH} == {"teacher"}
    assert all(call.conditioning is POSITIVE for call in networks.calls if call.role != "teacher")


# Draws


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
    rollout = method.rollout(START, 0, gradient=True)
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


# Cost


@every_phase
@pytest.mark.parametrize(("fake_updates", "fake_draws"), [(5, 1), (2, 3)])
def test_evaluations_per_update_are_the_calls_counted_over_all_steps(phase, fake_updates, fake_draws):
    method, networks = distiller(phase)
    steps = range(len(PLAN.phases[phase].sigmas))
    counted: Counter = Counter()
    for step in steps:
        for _ in range(fake_updates):
            rollout = method.rollout(START, step, gradient=False)
            for _ in range(fake_draws):
                method.fake_loss(rollout.x_s, POSITIVE, Renoising(method.draw_score_sigma(BATCH), normal(2)))
        generator_update(method, step)
    for call in networks.calls:
        purpose = {"teacher": "teacher", "fake": "fake" if call.recorded else "fake_score"}
        counted[purpose.get(call.role, "generator" if call.recorded else "rollout")] += 1
    expected = {purpose: count / len(steps) for purpose, count in counted.items()}
    assert evaluations_per_update(PLAN, phase, fake_updates, fake_draws) == pytest.approx(expected)

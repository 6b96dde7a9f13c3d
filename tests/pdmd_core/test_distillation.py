"""The losses of a phase: which role is asked what, and what gets gradient."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from pdmd_core.batch import Renoising
from pdmd_core.distillation import PhasedDistiller
from pdmd_core.evaluations import evaluations_per_update
from pdmd_core.flow import renoise, velocity_to_x0
from pdmd_core.method import Objective, fake_roles
from pdmd_core.objectives import RenoisedSamples, fake_score_loss, generator_direction
from pdmd_core.rollout import before_step
from pdmd_core.velocities import expert_velocities, guided_velocity
from tests.helpers.tiny_networks import (
    BATCH,
    DENOISING,
    FEATURES,
    NEGATIVE,
    PLAN,
    POSITIVE,
    REGRESSION,
    START,
    VARIANTS,
    TinyNetworks,
    distiller,
    every_phase,
    generator_update,
    normal,
)


def normal_t(method: PhasedDistiller) -> torch.Tensor:
    return method.draw_score_sigma(BATCH, torch.Generator().manual_seed(2))


# Which role gets gradient from which loss


@every_phase
def test_fake_loss_reaches_only_the_fake(phase):
    method, networks = distiller(phase)
    rollout = method.expert_rollout(START, 0)
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
    x_s = method.fake_rollout(START, 0)
    method.fake_loss(x_s, POSITIVE, Renoising(method.draw_score_sigma(BATCH), normal(2)))
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


@every_phase
def test_per_step_each_truncation_is_learned_by_a_fake_of_its_own(phase):
    for step in range(len(PLAN.phases[phase].sigmas)):
        method, networks = distiller(phase, fake_rollouts="per_step")
        role = method.fakes[step]
        method.fake_loss(method.fake_rollout(START, step), POSITIVE, Renoising(normal_t(method), normal(2)), role)
        assert [call.role for call in networks.calls if call.recorded] == [["fake", "fake_2", "fake_3"][step]]
        networks.calls.clear()
        generator_update(method, step)
        assert [call.role for call in networks.calls if call.role.startswith("fake")] == [role]
    assert method.fakes == ("fake", "fake_2", "fake_3")[: step + 1]
    assert fake_roles(PLAN, method.objective) == ("fake", "fake_2", "fake_3")


@every_phase
def test_the_fake_of_whole_rollouts_sees_what_is_sampled_whichever_step_is_drawn(phase):
    method, _ = distiller(phase, fake_rollouts="whole")
    steps = len(PLAN.phases[phase].sigmas)
    blend, _ = distiller(phase)
    for step in range(steps):
        torch.testing.assert_close(method.fake_rollout(START, step), blend.fake_rollout(START, steps - 1))


@every_phase
def test_directions_at_several_draws_are_averaged(phase):
    method, _ = distiller(phase, score_draws=2)
    rollout = method.expert_rollout(START, 0)
    draws = [Renoising(normal_t(method), normal(seed)) for seed in (3, 4)]
    gradients = []
    for chosen in (draws[:1], draws[1:], draws):
        leaf = replace(rollout, x_s=rollout.x_s.detach().requires_grad_())
        method.generator_loss(leaf, START, *chosen).loss.backward()
        gradients.append(leaf.x_s.grad)
    torch.testing.assert_close(gradients[2], (gradients[0] + gradients[1]) / 2)


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
    rollout = method.expert_rollout(START, 0)
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
    rollout = method.expert_rollout(START, 1)
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
    torch.testing.assert_close(rollout.x_s.detach(), last.x + (PLAN.boundaries[1] - PLAN.sigmas[3]) * velocity)
    torch.testing.assert_close(rollout.x0, velocity_to_x0(last.x, velocity, last.sigma))
    torch.testing.assert_close(method.fake_rollout(START, 1), rollout.x_s.detach())


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


# Regression


@every_phase
def test_regression_trains_the_expert_alone_by_the_mean_velocity_of_the_guided_path(phase):
    method, networks = distiller(phase, **REGRESSION, guidance_scale=2.5)
    step = len(PLAN.phases[phase].sigmas) - 1
    loss = method.path_loss(START, step)
    loss.backward()
    assert networks.roles_with_gradient() == {method.expert} and method.fakes == ()
    sigma, end = PLAN.phases[phase].sigmas[step], method.sigma_end
    experts = expert_velocities(networks, PLAN, POSITIVE)
    with torch.no_grad():
        start = before_step(experts, PLAN, phase, step, START.noise)
        reached, middle = start, [sigma, sigma + (end - sigma) / 3, sigma + 2 * (end - sigma) / 3, end]
        for a, b in pairwise(middle):
            reached = reached + (b - a) * guided_velocity(networks, reached, a, POSITIVE, NEGATIVE, 2.5)
        expected = (experts[phase](start, sigma) - (reached - start) / (end - sigma)).square().mean()
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=0)


def test_an_expert_that_is_the_teacher_has_nothing_to_learn_from_a_path_of_one_step():
    method, networks = distiller(1, expert_loss="regression", path_steps=1, guidance_scale=1.0)
    networks.networks[method.expert] = networks.networks["teacher"]
    assert max(method.path_loss(START, step).item() for step in range(3)) < 1e-12


# Denoising


@every_phase
def test_denoising_trains_the_expert_alone_by_the_velocity_of_what_the_guided_teacher_samples(phase):
    method, networks = distiller(phase, **DENOISING, guidance_scale=2.5)
    t, noise = normal_t(method), normal(3)
    loss = method.denoising_loss(START, Renoising(t, noise))
    loss.backward()
    assert networks.roles_with_gradient() == {method.expert} and method.fakes == ()
    end, start = PLAN.interval(phase)
    assert bool(((end < t) & (t < start)).all()), "inside the phase"
    with torch.no_grad():
        x = START.noise
        for sigma, after in pairwise([*PLAN.sigmas, 0.0]):
            for a, b in pairwise([sigma, (sigma + after) / 2, after]):
                x = x + (b - a) * guided_velocity(networks, x, a, POSITIVE, NEGATIVE, 2.5)
        torch.testing.assert_close(method.teacher_samples(START), x)
        at = t.double().reshape(-1, 1)
        found = networks.velocity(method.expert, (1 - at) * x + at * noise, t, POSITIVE)
    torch.testing.assert_close(loss.detach().double(), (found - (noise - x)).square().mean(), rtol=1e-5, atol=0)
    networks.calls.clear()
    again = method.denoising_loss(replace(START, noise=x, begun=True), Renoising(t, noise))
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)
    assert [call.role for call in networks.calls] == [method.expert], "samples that were made once are not made again"
    outside = Renoising(torch.full((BATCH,), end / 2), noise)
    with pytest.raises(ValueError, match=f"phase '{method.expert}' learns at sigmas in"):
        method.denoising_loss(START, outside)


# Cost


@every_phase
@pytest.mark.parametrize(("fake_updates", "fake_draws"), [(5, 1), (2, 3)])
@pytest.mark.parametrize("choices", [{}, *VARIANTS, REGRESSION, DENOISING], ids=str)
def test_evaluations_per_update_are_the_calls_counted_over_all_steps(phase, fake_updates, fake_draws, choices):
    method, networks = distiller(phase, **choices)
    steps = range(len(PLAN.phases[phase].sigmas))
    counted: Counter = Counter()
    for step in steps:
        if method.regresses:
            method.path_loss(START, step)
            continue
        if method.denoises:
            method.denoising_loss(START, Renoising(normal_t(method), normal(2)))
            continue
        for _ in range(fake_updates):
            x_s = method.fake_rollout(START, step)
            for _ in range(fake_draws):
                renoising = Renoising(method.draw_score_sigma(BATCH), normal(2))
                method.fake_loss(x_s, POSITIVE, renoising, method.fake_of(step))
        generator_update(method, step)
    for call in networks.calls:
        purpose = {"teacher": "teacher"} | dict.fromkeys(method.fakes, "fake" if call.recorded else "fake_score")
        counted[purpose.get(call.role, "generator" if call.recorded else "rollout")] += 1
    expected = {purpose: count / len(steps) for purpose, count in counted.items()}
    assert evaluations_per_update(PLAN, phase, method.objective, fake_updates, fake_draws) == pytest.approx(expected)
    earlier = {p.name for p in PLAN.phases[:phase]}
    if method.denoises:
        expected["teacher"] = 0.0
    else:
        expected["rollout"] -= sum(call.role in earlier for call in networks.calls) / len(steps)
    begun = evaluations_per_update(PLAN, phase, method.objective, fake_updates, fake_draws, begun=True)
    assert begun == pytest.approx(expected), "what a bank leaves"

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from pdmd_core.phases import PhasePlan, PhasePlanError
from pdmd_core.rollout import before_step, route, sample, simulate, simulate_whole

PLAN = PhasePlan.from_sigmas([[1.0, 0.95], [0.9, 0.8, 0.65], [0.5, 0.2]])
ENDS = (0.9, 0.5, 0.0)
EVERY_STEP = [(phase, step) for phase in range(3) for step in range(len(PLAN.phases[phase].sigmas))]
every_step = pytest.mark.parametrize(("phase", "step"), EVERY_STEP)


@dataclass
class Call:
    expert: int
    sigma: float
    recorded: bool
    """Whether autograd records the evaluation."""


@dataclass
class Experts:
    """Three experts with known velocities and one weight each; every call is written down."""

    calls: list[Call] = field(default_factory=list)
    weights: nn.ParameterList = field(
        default_factory=lambda: nn.ParameterList(nn.Parameter(torch.tensor(w)) for w in (0.7, -1.3, 2.1))
    )

    def velocity(self, expert: int, x: Tensor, sigma: float) -> Tensor:
        return self.weights[expert] * x + 3 * sigma + expert

    def networks(self) -> list:
        def network(expert):
            def call(x, sigma):
                velocity = self.velocity(expert, x, sigma)
                self.calls.append(Call(expert, sigma, velocity.requires_grad))
                return velocity

            return call

        return [network(expert) for expert in range(3)]


@pytest.fixture
def experts() -> Experts:
    return Experts()


def noise() -> Tensor:
    return torch.randn(4, 2, generator=torch.Generator().manual_seed(1))


def by_hand(phase: int, step: int) -> tuple[Tensor, Tensor]:
    """(x before the last jump, velocity of the last jump), written out for PLAN."""
    path = [(0, 1.0), (0, 0.95), (1, 0.9), (1, 0.8), (1, 0.65), (2, 0.5), (2, 0.2)]
    last = path.index((phase, PLAN.phases[phase].sigmas[step]))
    x, velocities = noise(), Experts()
    with torch.no_grad():
        for (expert, sigma), (_, following) in pairwise(path[: last + 1]):
            x = x + (following - sigma) * velocities.velocity(expert, x, sigma)
        return x, velocities.velocity(phase, x, path[last][1])


# Backward simulation


@every_step
@pytest.mark.parametrize("gradient", [False, True])
def test_simulation_equals_a_loop_by_hand_with_one_jump_to_the_end_of_the_phase(experts, phase, step, gradient):
    rollout = simulate(experts.networks(), PLAN, phase, step, noise(), gradient)
    x, velocity = by_hand(phase, step)
    sigma = PLAN.phases[phase].sigmas[step]
    assert (rollout.sigma, rollout.sigma_end) == (sigma, ENDS[phase])
    torch.testing.assert_close(rollout.x_s.detach(), x + (ENDS[phase] - sigma) * velocity)
    torch.testing.assert_close(rollout.x0, x - sigma * velocity)


@every_step
def test_simulation_calls_each_step_once_up_to_its_own_and_nothing_past_the_phase(experts, phase, step):
    simulate(experts.networks(), PLAN, phase, step, noise(), True)
    owners = [k for k, p in enumerate(PLAN.phases) for _ in p.sigmas]
    count = EVERY_STEP.index((phase, step)) + 1
    assert [(call.expert, call.sigma) for call in experts.calls] == list(zip(owners, PLAN.sigmas, strict=True))[:count]
    assert min(call.sigma for call in experts.calls) > ENDS[phase]


@every_step
def test_exactly_one_evaluation_carries_gradient(experts, phase, step):
    rollout = simulate(experts.networks(), PLAN, phase, step, noise(), True)
    assert [(c.expert, c.sigma) for c in experts.calls if c.recorded] == [(phase, PLAN.phases[phase].sigmas[step])]
    rollout.x_s.sum().backward()
    assert [weight.grad is not None for weight in experts.weights] == [k == phase for k in range(3)]


@every_step
def test_gradient_is_that_of_the_last_jump_alone(experts, phase, step):
    rollout = simulate(experts.networks(), PLAN, phase, step, noise(), True)
    rollout.x_s.sum().backward()
    x, _ = by_hand(phase, step)
    expected = ((ENDS[phase] - PLAN.phases[phase].sigmas[step]) * x).sum()
    torch.testing.assert_close(experts.weights[phase].grad, expected)


def test_nothing_carries_gradient_when_none_is_asked_for(experts):
    rollout = simulate(experts.networks(), PLAN, 1, 2, noise(), False)
    assert not any(call.recorded for call in experts.calls)
    assert not rollout.x_s.requires_grad


def test_the_jump_to_clean_data_never_carries_gradient(experts):
    rollout = simulate(experts.networks(), PLAN, 1, 1, noise(), True)
    assert rollout.x_s.requires_grad
    assert not rollout.x0.requires_grad


def test_gradient_is_recorded_inside_a_caller_that_switched_it_off(experts):
    with torch.no_grad():
        rollout = simulate(experts.networks(), PLAN, 0, 0, noise(), True)
        assert not torch.is_grad_enabled()
    assert rollout.x_s.requires_grad


def test_the_last_phase_jumps_to_clean_data(experts):
    rollout = simulate(experts.networks(), PLAN, 2, 0, noise(), False)
    assert rollout.sigma_end == 0
    torch.testing.assert_close(rollout.x_s, rollout.x0)


def test_a_half_precision_network_does_not_round_the_samples():
    velocity = torch.full((4, 2), 1.1, dtype=torch.bfloat16)
    rollout = simulate([lambda x, sigma: velocity] * 3, PLAN, 0, 1, noise(), False)
    assert rollout.x_s.dtype == torch.float32
    expected = noise() + (0.9 - 1.0) * velocity.float()
    torch.testing.assert_close(rollout.x_s, expected)


@pytest.mark.parametrize("step", [-1, 3])
def test_a_step_outside_the_phase_is_an_error_that_names_its_steps(experts, step):
    with pytest.raises(ValueError, match=rf"'middle_noise' has steps 0\.\.2, found step {step}"):
        simulate(experts.networks(), PLAN, 1, step, noise(), False)
    assert experts.calls == []


@pytest.mark.parametrize("phase", [-1, 3])
def test_a_phase_outside_the_plan_is_an_error_that_names_its_phases(experts, phase):
    with pytest.raises(PhasePlanError, match=rf"{phase} is not in 0\.\.2"):
        simulate(experts.networks(), PLAN, phase, 0, noise(), False)
    assert experts.calls == []


# Whole rollouts


@every_step
@pytest.mark.parametrize("through", [True, False])
def test_a_whole_rollout_is_the_simulation_of_the_last_step_whichever_step_trains(experts, phase, step, through):
    found = simulate_whole(experts.networks(), PLAN, phase, step, noise(), through)
    expected = simulate(experts.networks(), PLAN, phase, len(PLAN.phases[phase].sigmas) - 1, noise(), False)
    torch.testing.assert_close((found.x_s.detach(), found.x0), (expected.x_s, expected.x0))
    assert (found.step, found.sigma_end, found.x0.requires_grad) == (step, ENDS[phase], False)


def test_the_gradient_through_the_rest_of_a_phase_is_that_of_its_formula(experts):
    simulate_whole(experts.networks(), PLAN, 1, 1, noise(), True).x_s.sum().backward()
    assert [(c.expert, c.sigma) for c in experts.calls if c.recorded] == [(1, 0.8), (1, 0.65)]
    x, _ = by_hand(1, 1)
    weight = torch.tensor(-1.3, requires_grad=True)
    for sigma, following in ((0.8, 0.65), (0.65, 0.5)):
        x = x + (following - sigma) * (weight * x + 3 * sigma + 1)
    x.sum().backward()
    torch.testing.assert_close(experts.weights[1].grad, weight.grad)


@pytest.mark.parametrize(("step", "increment"), [(0, 0.8 - 0.9), (1, 0.65 - 0.8), (2, 0.5 - 0.65)])
def test_the_gradient_of_an_own_increment_is_that_of_one_step_of_the_walk(experts, step, increment):
    simulate_whole(experts.networks(), PLAN, 1, step, noise(), False).x_s.sum().backward()
    assert [(c.expert, c.sigma) for c in experts.calls if c.recorded] == [(1, PLAN.phases[1].sigmas[step])]
    x, _ = by_hand(1, step)
    torch.testing.assert_close(experts.weights[1].grad, (increment * x).sum())
    assert [weight.grad is not None for weight in experts.weights] == [False, True, False]


# Sampling


def test_sampling_calls_the_owner_of_every_sigma_and_ends_at_zero(experts):
    result = sample(route(experts.networks(), PLAN), PLAN.sigmas, noise())
    owners = [k for k, p in enumerate(PLAN.phases) for _ in p.sigmas]
    assert [(call.expert, call.sigma) for call in experts.calls] == list(zip(owners, PLAN.sigmas, strict=True))
    x, velocity = by_hand(2, 1)
    torch.testing.assert_close(result, x - 0.2 * velocity)


def test_sampling_is_the_simulation_of_the_last_step(experts):
    rollout = simulate(experts.networks(), PLAN, 2, 1, noise(), False)
    torch.testing.assert_close(sample(route(experts.networks(), PLAN), PLAN.sigmas, noise()), rollout.x_s)


def test_sampling_records_no_gradient(experts):
    assert not sample(route(experts.networks(), PLAN), PLAN.sigmas, noise()).requires_grad
    assert not any(call.recorded for call in experts.calls)


def test_sampling_reports_progress_after_every_step():
    events = []

    def velocity(x, sigma):
        events.append(sigma)
        return x

    sample(velocity, [1.0, 0.5], noise(), progress=lambda step, of: events.append((step, of)))
    assert events == [1.0, (1, 2), 0.5, (2, 2)]


def test_sampling_a_known_straight_path_is_exact():
    x0 = torch.full((4, 2), 3.0)
    result = sample(lambda x, sigma: (x - x0) / sigma, [1.0, 0.9, 0.3], noise())
    torch.testing.assert_close(result, x0)


def test_route_sends_a_rounded_boundary_to_the_later_expert(experts):
    velocity = route(experts.networks(), PLAN)
    for sigma in (0.95, 0.9 * (1 + 5e-5), 0.9, 0.5 * (1 + 5e-5), 0.5, 0.01):
        velocity(noise(), sigma)
    assert [call.expert for call in experts.calls] == [0, 1, 1, 2, 2, 2]


def test_route_refuses_sigma_outside_the_range(experts):
    with pytest.raises(PhasePlanError):
        route(experts.networks(), PLAN)(noise(), 0.0)


@pytest.mark.parametrize(("phase", "step"), [(1, 0), (1, 2), (2, 0)])
def test_a_rollout_may_begin_with_what_earlier_experts_made(phase: int, step: int) -> None:
    experts = Experts()
    begun = before_step(experts.networks(), PLAN, phase, 0, noise())
    from_noise, from_there = (
        simulate(experts.networks(), PLAN, phase, step, start, False, begun=start is begun)
        for start in (noise(), begun)
    )
    whole = simulate_whole(experts.networks(), PLAN, phase, step, begun, False, begun=True)
    assert torch.equal(from_there.x_s, from_noise.x_s) and torch.equal(from_there.x0, from_noise.x0)
    assert torch.equal(whole.x_s, simulate_whole(experts.networks(), PLAN, phase, step, noise(), False).x_s)

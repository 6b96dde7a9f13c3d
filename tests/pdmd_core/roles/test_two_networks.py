"""Roles on a teacher of two networks: each sample is evaluated by the network of its sigma, and by no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from pdmd_core.families import TeacherRouting, family
from pdmd_core.roles import FAKE, TEACHER, Roles, RoleSpec
from tests.helpers.tiny import LATENT_SHAPE, TEXT_FEATURES, randn, randomise, transformer

WAN = family("wan")
FIRST, SECOND = "transformer", "transformer_2"
ROUTING = TeacherRouting((FIRST, SECOND), 0.875)
SIGMAS = torch.tensor([0.3, 0.95, 0.875, 0.6, 0.9])
"""Second, first, first (on the boundary), second, first."""
X = randn(len(SIGMAS), *LATENT_SHAPE)
CONDITIONING = {"prompt_embeds": randn(len(SIGMAS), 5, TEXT_FEATURES, seed=1)}


def specs(kind: str) -> dict[str, RoleSpec]:
    return {
        "high": RoleSpec(kind, 4, 6.0, components=(FIRST,)),
        "low": RoleSpec(kind, 4, 6.0, components=(SECOND,)),
        FAKE: RoleSpec(kind, 4, 6.0),
    }


@pytest.fixture(params=["lora", "full"])
def roles(request: pytest.FixtureRequest) -> Roles:
    return Roles({FIRST: transformer(0), SECOND: transformer(1)}, WAN, specs(request.param), ROUTING)


@contextmanager
def rows_seen(roles: Roles, role: str) -> Iterator[dict[str, list[int]]]:
    """How many samples each network of a role was asked for, call by call."""
    seen: dict[str, list[int]] = {name: [] for name in roles.components(role)}
    handles = []
    for name, calls in seen.items():

        def record(module: object, args: object, kwargs: dict[str, Tensor], calls: list[int] = calls) -> None:
            calls.append(len(kwargs["hidden_states"]))

        handles.append(roles.network(role, name).register_forward_pre_hook(record, with_kwargs=True))
    yield seen
    for handle in handles:
        handle.remove()


def alone(component: str, row: int) -> Tensor:
    """What a network without roles says about one sample."""
    conditioning = {"prompt_embeds": CONDITIONING["prompt_embeds"][row : row + 1]}
    network = transformer(0 if component == FIRST else 1)
    return WAN.velocity(network, X[row : row + 1], SIGMAS[row : row + 1], conditioning)


@torch.no_grad()
@pytest.mark.parametrize("role", [TEACHER, FAKE])
def test_each_sample_gets_the_network_of_its_sigma_in_its_own_place(roles: Roles, role: str) -> None:
    with rows_seen(roles, role) as seen:
        together = roles.velocity(role, X, SIGMAS, CONDITIONING)
    assert seen == {FIRST: [3], SECOND: [2]}, "each network is asked once, for its own samples only"
    for row, component in enumerate([SECOND, FIRST, FIRST, SECOND, FIRST]):
        torch.testing.assert_close(together[row : row + 1], alone(component, row), rtol=1e-5, atol=1e-6)
        other = FIRST if component == SECOND else SECOND
        assert (together[row : row + 1] - alone(other, row)).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize(
    ("sigma", "component"),
    [(0.95, FIRST), (0.875, FIRST), (0.8749, SECOND), (torch.full((5,), 0.5), SECOND), (torch.tensor(0.9), FIRST)],
    ids=str,
)
def test_a_batch_on_one_side_costs_one_evaluation(roles: Roles, sigma: float | Tensor, component: str) -> None:
    with rows_seen(roles, TEACHER) as seen:
        found = roles.velocity(TEACHER, X, sigma, CONDITIONING)
    assert seen == {FIRST: [], SECOND: []} | {component: [len(X)]}
    assert torch.equal(found, WAN.velocity(transformer(0 if component == FIRST else 1), X, sigma, CONDITIONING))


@pytest.mark.parametrize("boundary", [0.875, 0.9, 0.417])
def test_the_boundary_belongs_to_the_first_network_as_in_the_stock_pipeline(boundary: float) -> None:
    routing = TeacherRouting((FIRST, SECOND), boundary)
    timestep = torch.tensor(boundary, dtype=torch.float32) * 1000
    assert bool(timestep >= boundary * 1000) == bool(routing.first_runs(torch.tensor(boundary)))
    assert routing.component_at(boundary) == FIRST
    assert routing.component_at(boundary - 1e-3) == SECOND


@torch.no_grad()
@pytest.mark.parametrize(("role", "component"), [("high", FIRST), ("low", SECOND)])
def test_an_expert_stands_on_one_network_at_all_sigmas(roles: Roles, role: str, component: str) -> None:
    randomise(roles, role, seed=3)
    with rows_seen(roles, role) as seen:
        found = roles.velocity(role, X, SIGMAS, CONDITIONING)
    assert seen == {component: [len(X)]}
    network = transformer(0 if component == FIRST else 1)
    only = Roles(network, WAN, {role: RoleSpec(roles.specs[role].kind, 4, 6.0)})
    only.load_state_dict(role, roles.state_dict(role))
    assert torch.equal(found, only.velocity(role, X, SIGMAS, CONDITIONING))


@torch.no_grad()
def test_who_asked_is_told_which_role_computes_and_which_of_the_teacher_s_networks_runs(roles: Roles) -> None:
    told, used = list[str](), list[str]()
    roles.before_role, roles.before_use = told.append, used.append
    roles.velocity("low", X, SIGMAS, CONDITIONING)
    assert (told, used) == (["low"], [] if roles.owns_copies("low") else [SECOND])
    roles.velocity(TEACHER, X, SIGMAS, CONDITIONING)
    assert told[1:] == [TEACHER, TEACHER] and used[-2:] == [FIRST, SECOND]


@torch.no_grad()
def test_no_role_changes_another(roles: Roles) -> None:
    before = {role: roles.velocity(role, X, SIGMAS, CONDITIONING) for role in (TEACHER, *roles.specs)}
    for changed in roles.specs:
        randomise(roles, changed, seed=5)
        for role in before:
            now = roles.velocity(role, X, SIGMAS, CONDITIONING)
            assert torch.equal(now, before[role]) == (role != changed), (role, changed)
        roles.reset(changed)
        assert torch.equal(roles.velocity(changed, X, SIGMAS, CONDITIONING), before[changed])


@pytest.mark.parametrize(
    ("sigmas", "reached"),
    [(SIGMAS, {FIRST, SECOND}), (torch.full((5,), 0.9), {FIRST}), (torch.full((5,), 0.2), {SECOND})],
    ids=["both", "first", "second"],
)
def test_gradient_of_the_mixture_reaches_the_networks_that_were_asked(
    roles: Roles, sigmas: Tensor, reached: set[str]
) -> None:
    randomise(roles, FAKE, seed=2)
    roles.set_trainable([FAKE])
    loss = roles.velocity(FAKE, X, sigmas, CONDITIONING).square().sum()
    with torch.no_grad():
        for role in (TEACHER, "high", "low"):
            roles.velocity(role, X, SIGMAS, CONDITIONING)
    loss.backward()
    found = {name.partition(".")[0] for name, p in roles.named_parameters(FAKE).items() if p.grad is not None}
    assert found == reached
    assert all(p.grad is None for role in ("high", "low") for p in roles.parameters(role))


def test_the_gradient_of_each_sample_is_that_of_its_own_network(roles: Roles) -> None:
    randomise(roles, FAKE, seed=2)
    roles.set_trainable([FAKE])
    weight = randn(*X.shape, seed=9)
    (weight * roles.velocity(FAKE, X, SIGMAS, CONDITIONING)).sum().backward()
    together = {name: p.grad.clone() for name, p in roles.named_parameters(FAKE).items() if p.grad is not None}
    for p in roles.parameters(FAKE):
        p.grad = None
    for row in range(len(X)):
        conditioning = {"prompt_embeds": CONDITIONING["prompt_embeds"][row : row + 1]}
        velocity = roles.velocity(FAKE, X[row : row + 1], SIGMAS[row : row + 1], conditioning)
        (weight[row : row + 1] * velocity).sum().backward()
    for name, p in roles.named_parameters(FAKE).items():
        assert p.grad is not None
        torch.testing.assert_close(together[name], p.grad, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_weights_of_both_networks_survive_state_dict_and_load_state_dict(roles: Roles) -> None:
    randomise(roles, FAKE, seed=2)
    state = {name: value.clone() for name, value in roles.state_dict(FAKE).items()}
    assert {name.partition(".")[0] for name in state} == {FIRST, SECOND}
    assert not any(name.startswith((FIRST, SECOND)) for name in roles.state_dict("low"))
    expected = roles.velocity(FAKE, X, SIGMAS, CONDITIONING)
    roles.reset(FAKE)
    assert not torch.equal(roles.velocity(FAKE, X, SIGMAS, CONDITIONING), expected)
    roles.load_state_dict(FAKE, state)
    assert torch.equal(roles.velocity(FAKE, X, SIGMAS, CONDITIONING), expected)
    for component, seed in ((FIRST, 0), (SECOND, 1)):
        original = transformer(seed).state_dict()
        found = roles.base_state_dict(component)
        assert list(found) == list(original) and all(torch.equal(found[name], original[name]) for name in original)


def test_networks_that_do_not_fit_the_routing_are_one_line() -> None:
    networks = {FIRST: transformer(0), SECOND: transformer(1)}
    with pytest.raises(ValueError, match="networks are transformer, found transformer and transformer_2"):
        Roles(networks, WAN, {})
    with pytest.raises(ValueError, match="'high' stands on transformer_3"):
        Roles(networks, WAN, {"high": RoleSpec(components=("transformer_3",))}, ROUTING)
    with pytest.raises(
        ValueError, match="two and a boundary in sigma, found transformer, transformer_2 and boundary None"
    ):
        TeacherRouting((FIRST, SECOND))

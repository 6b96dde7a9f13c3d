"""Which weights of which role get gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pdmd_core.roles import FAKE, TEACHER, Roles
from tests.helpers.role_mixes import CONDITIONING, SIGMA, X, gradients, velocity
from tests.helpers.tiny import randomise


def test_nothing_is_trainable_at_the_start(roles: Roles) -> None:
    assert not any(p.requires_grad for role in roles.specs for p in roles.parameters(role))
    assert not any(p.requires_grad for p in roles.bases["transformer"].parameters())


@pytest.mark.parametrize("trainable", [("high",), ("low", FAKE), (FAKE,), ()])
def test_exactly_the_trainable_roles_require_gradient_after_activations_in_any_order(
    roles: Roles, trainable: tuple[str, ...]
) -> None:
    roles.set_trainable(trainable)
    wanted = {id(p) for role in trainable for p in roles.parameters(role)}
    networks = [roles.network(role) for role in (TEACHER, *roles.specs)]
    every = {id(p): p for network in networks for p in network.parameters()}
    assert wanted <= set(every)
    for order in itertools.permutations([TEACHER, *roles.specs]):
        for role in order:
            roles.activate(role)
            assert {i for i, p in every.items() if p.requires_grad} == wanted, order


def test_a_recorded_graph_gets_its_gradient_after_other_roles_were_activated(roles: Roles) -> None:
    for seed, role in enumerate(roles.specs):
        randomise(roles, role, seed)
    roles.set_trainable(["high"])
    velocity(roles, "high").square().sum().backward()
    expected = {name: g.clone() for name, g in gradients(roles, "high").items() if g is not None}
    assert len(expected) == len(roles.parameters("high"))
    for p in roles.parameters("high"):
        p.grad = None

    loss = velocity(roles, "high").square().sum()
    with torch.no_grad():
        for role in (TEACHER, FAKE, "low", TEACHER):
            velocity(roles, role)
    loss.backward()
    for name, gradient in gradients(roles, "high").items():
        assert gradient is not None and torch.equal(gradient, expected[name]), name


def test_a_backward_pass_reaches_its_own_role_and_no_other(roles: Roles) -> None:
    for role in roles.specs:
        randomise(roles, role, seed=0)
    roles.set_trainable(roles.specs)
    for trained in roles.specs:
        velocity(roles, trained).square().sum().backward()
        for role in roles.specs:
            has = [g is not None and bool(g.abs().sum() > 0) for g in gradients(roles, role).values()]
            assert any(has) == (role == trained), (trained, role)
            for p in roles.parameters(role):
                p.grad = None
    assert all(p.grad is None for p in roles.bases["transformer"].parameters())


def test_a_frozen_role_passes_gradient_to_its_input_only(roles: Roles) -> None:
    roles.set_trainable(["high"])
    x = X.clone().requires_grad_()
    roles.velocity(FAKE, x, SIGMA, CONDITIONING).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(g is None for role in roles.specs for g in gradients(roles, role).values())


def test_gradient_checkpointing_gives_the_same_gradient_when_the_role_is_active_again(roles: Roles) -> None:
    for seed, role in enumerate(roles.specs):
        randomise(roles, role, seed)
    roles.set_trainable(["high"])
    velocity(roles, "high").square().sum().backward()
    expected = {name: g.clone() for name, g in gradients(roles, "high").items() if g is not None}
    for p in roles.parameters("high"):
        p.grad = None

    for role in roles.specs:
        roles.network(role).enable_gradient_checkpointing()
    calls = count_calls(roles.network("high").blocks[0])
    loss = velocity(roles, "high").square().sum()
    with torch.no_grad():
        velocity(roles, TEACHER)
        velocity(roles, FAKE)
    roles.activate("high")
    before = calls()
    loss.backward()
    assert calls() == before + 1, "the block runs again in the backward pass"
    for name, gradient in gradients(roles, "high").items():
        torch.testing.assert_close(gradient, expected[name])


def count_calls(module: nn.Module) -> Callable[[], int]:
    seen: list[None] = []
    module.register_forward_pre_hook(lambda *_: seen.append(None))
    return lambda: len(seen)


def test_parameters_that_took_the_place_of_others_get_gradient_as_their_role_does(lora_roles: Roles) -> None:
    lora_roles.set_trainable(["high"])
    for module in lora_roles.network(TEACHER).modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    lora_roles.forget_parameters()
    trainable = {role: {p.requires_grad for p in lora_roles.parameters(role)} for role in lora_roles.specs}
    assert trainable == {"high": {True}, "low": {False}, FAKE: {False}}

"""Weights of a role are reset, saved and loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from pdmd_core.families import family
from pdmd_core.roles import FAKE, TEACHER, Roles
from tests.helpers.role_mixes import CONDITIONING, SIGMA, X, gradients, one_line, teacher_output, velocity
from tests.helpers.tiny import randomise, transformer


@torch.no_grad()
def test_reset_makes_a_role_the_teacher_again_and_leaves_the_others(roles: Roles) -> None:
    for seed, role in enumerate(roles.specs):
        randomise(roles, role, seed)
    low = velocity(roles, "low")
    for role in ("high", FAKE):
        roles.reset(role)
        assert torch.equal(velocity(roles, role), teacher_output())
    assert torch.equal(velocity(roles, "low"), low)


def test_reset_of_a_lora_role_can_learn_again_and_follows_its_generator(lora_roles: Roles) -> None:
    def reset(role: str, seed: int) -> dict[str, Tensor]:
        lora_roles.reset(role, torch.Generator().manual_seed(seed))
        return {name: value.clone() for name, value in lora_roles.state_dict(role).items()}

    first, again, other = reset("high", 1), reset("low", 1), reset("high", 2)
    for name, value in first.items():
        if name.endswith("lora_A"):
            bound = value.shape[1] ** -0.5
            assert 0.5 * bound < value.abs().max() <= bound
            assert torch.equal(value, again[name]) and not torch.equal(value, other[name])
        else:
            assert not value.any()
    lora_roles.set_trainable(["high"])
    velocity(lora_roles, "high").square().sum().backward()
    ups = [g for name, g in gradients(lora_roles, "high").items() if name.endswith("lora_B")]
    assert all(g is not None and g.abs().sum() > 0 for g in ups)


def test_reset_keeps_the_parameter_objects_that_an_optimizer_holds(roles: Roles) -> None:
    before = {role: [id(p) for p in roles.parameters(role)] for role in roles.specs}
    for role in roles.specs:
        roles.reset(role)
        assert [id(p) for p in roles.parameters(role)] == before[role]


@torch.no_grad()
def test_weights_survive_state_dict_and_load_state_dict(roles: Roles) -> None:
    for seed, role in enumerate(roles.specs):
        randomise(roles, role, seed)
    saved = {role: copy.deepcopy(roles.state_dict(role)) for role in roles.specs}
    other = Roles(transformer(), family("wan"), roles.specs)
    for role, state in saved.items():
        assert not any(value.requires_grad for value in state.values())
        other.load_state_dict(role, state)
        assert list(other.state_dict(role)) == list(state)
        assert torch.equal(velocity(other, role), velocity(roles, role))
    assert torch.equal(velocity(other, TEACHER), teacher_output())


def test_parameters_come_in_the_order_of_their_names(roles: Roles) -> None:
    for role in roles.specs:
        named = roles.named_parameters(role)
        assert [id(p) for p in roles.parameters(role)] == [id(p) for p in named.values()]
        assert all(
            named[name] is not None and torch.equal(named[name], v) for name, v in roles.state_dict(role).items()
        )


@torch.no_grad()
def test_base_state_dict_is_the_original_network_s(roles: Roles) -> None:
    original = transformer().state_dict()
    for seed, role in enumerate(roles.specs):
        randomise(roles, role, seed)
        roles.activate(role)
    found = roles.base_state_dict()
    assert list(found) == list(original)
    assert all(torch.equal(found[name], value) for name, value in original.items())
    fresh = transformer(seed=1)
    fresh.load_state_dict(found)
    assert torch.equal(family("wan").velocity(fresh, X, SIGMA, CONDITIONING), teacher_output())


def test_the_state_of_a_role_that_trains_carries_no_gradient(roles: Roles) -> None:
    roles.set_trainable(["high", FAKE])
    assert not any(value.requires_grad for role in ("high", FAKE) for value in roles.state_dict(role).values())


def test_loading_weights_of_other_names_says_what_is_missing_and_unexpected(roles: Roles) -> None:
    state = dict(roles.state_dict("high"))
    first = next(iter(state))
    renamed = {("nonsense" if name == first else name): value for name, value in state.items()}
    with pytest.raises(ValueError) as caught:
        roles.load_state_dict("high", renamed)
    text = one_line(caught.value)
    assert "'high'" in text and f"missing 1 ({first})" in text and "unexpected 1 (nonsense)" in text


@torch.no_grad()
def test_loading_weights_of_another_shape_names_both_shapes_and_changes_nothing(roles: Roles) -> None:
    last = list(roles.state_dict("high"))[-1]
    state = {name: torch.ones_like(value) for name, value in roles.state_dict("high").items()}
    shape = tuple(state[last].shape)
    state[last] = torch.zeros(3, 7)
    before = velocity(roles, "high")
    with pytest.raises(ValueError) as caught:
        roles.load_state_dict("high", state)
    text = one_line(caught.value)
    assert last in text and str(shape) in text and "(3, 7)" in text
    assert torch.equal(velocity(roles, "high"), before)

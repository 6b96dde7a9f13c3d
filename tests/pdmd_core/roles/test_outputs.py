"""What each role computes."""

from __future__ import annotations

import itertools

import pytest
import torch

from pdmd_core.families import family
from pdmd_core.roles import FAKE, TEACHER, Roles, RoleSpec
from tests.helpers.role_mixes import CONDITIONING, MIXES, SIGMA, X, teacher_output, velocity
from tests.helpers.tiny import randomise, transformer


@torch.no_grad()
def test_every_role_equals_the_teacher_at_the_start(roles: Roles) -> None:
    expected = teacher_output()
    for role in (TEACHER, "high", "low", FAKE):
        assert torch.equal(velocity(roles, role), expected), role


@torch.no_grad()
def test_the_teacher_never_changes_whatever_the_weights_of_the_other_roles(roles: Roles) -> None:
    expected = teacher_output()
    for seed, role in enumerate(roles.specs):
        randomise(roles, role, seed)
        assert (velocity(roles, role) - expected).abs().max() > 0.05
        assert torch.equal(velocity(roles, TEACHER), expected)


@torch.no_grad()
def test_changing_one_role_changes_no_other(roles: Roles) -> None:
    expected = teacher_output()
    randomise(roles, "high", seed=3)
    changed = velocity(roles, "high")
    for other in ("low", FAKE):
        assert torch.equal(velocity(roles, other), expected)
    assert torch.equal(velocity(roles, "high"), changed)


@torch.no_grad()
def test_roles_do_not_depend_on_the_order_in_which_they_are_asked(roles: Roles) -> None:
    for seed, role in enumerate(roles.specs):
        randomise(roles, role, seed)
    names = [TEACHER, *roles.specs]
    alone = {role: velocity(roles, role) for role in names}
    for first, second in itertools.product(names, names):
        velocity(roles, first)
        assert torch.equal(velocity(roles, second), alone[second]), (first, second)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 6.0), (4, 4.0), (8, 1.0)])
@torch.no_grad()
def test_a_lora_role_is_the_base_plus_alpha_over_rank_times_up_times_down(rank: int, alpha: float) -> None:
    roles = Roles(transformer(), family("wan"), {"high": RoleSpec("lora", rank, alpha)})
    randomise(roles, "high", seed=0)
    weights = roles.state_dict("high")
    merged = transformer()
    modules = {name.rpartition(".")[0] for name in weights}
    assert len(modules) == 2 * len(family("wan").lora_targets)
    for module in modules:
        down, up = weights[f"{module}.lora_A"], weights[f"{module}.lora_B"]
        assert down.shape[0] == up.shape[1] == rank
        merged.get_submodule(module).weight.add_(alpha / rank * up @ down)
    expected = family("wan").velocity(merged, X, SIGMA, CONDITIONING)
    torch.testing.assert_close(velocity(roles, "high"), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_roles_may_adapt_different_modules() -> None:
    specs = {"high": RoleSpec("lora", 2, 2.0, ("attn1.to_q",)), "low": RoleSpec("lora", 4, 2.0, ("ffn.net.2",))}
    roles = Roles(transformer(), family("wan"), specs)
    assert set(roles.named_parameters("high")) == {
        f"blocks.{n}.attn1.to_q.lora_{half}" for n in (0, 1) for half in "AB"
    }
    assert set(roles.named_parameters("low")) == {f"blocks.{n}.ffn.net.2.lora_{half}" for n in (0, 1) for half in "AB"}
    randomise(roles, "high", seed=0)
    high = velocity(roles, "high")
    assert torch.equal(velocity(roles, "low"), teacher_output())
    assert torch.equal(velocity(roles, "high"), high)
    assert not torch.equal(high, teacher_output())


def test_a_full_role_shares_no_memory_with_the_base() -> None:
    roles = Roles(transformer(), family("wan"), MIXES["mixed"])
    base = {p.data_ptr() for p in roles.bases["transformer"].parameters()}
    own = {p.data_ptr() for p in roles.parameters(FAKE)}
    assert own and not own & base


def test_lora_roles_share_one_base_network(lora_roles: Roles) -> None:
    assert all(lora_roles.network(role) is lora_roles.bases["transformer"] for role in (TEACHER, *lora_roles.specs))


@torch.no_grad()
def test_the_weights_of_every_role_are_float32_on_a_base_in_half_precision() -> None:
    roles = Roles(transformer().to(torch.bfloat16), family("wan"), MIXES["mixed"])
    teacher = velocity(roles, TEACHER)
    assert teacher.dtype == torch.bfloat16 and {p.dtype for p in roles.bases["transformer"].parameters()} >= {
        torch.bfloat16
    }
    assert torch.equal(velocity(roles, "high"), teacher)
    torch.testing.assert_close(velocity(roles, FAKE), teacher.float(), rtol=0.05, atol=0.05)
    for role in ("high", FAKE):
        assert {p.dtype for p in roles.parameters(role)} == {torch.float32}
        randomise(roles, role, seed=0)
        assert (velocity(roles, role) - teacher).abs().max() > 0.1
        roles.load_state_dict(role, {name: v.to(torch.bfloat16) for name, v in roles.state_dict(role).items()})
        assert {p.dtype for p in roles.parameters(role)} == {torch.float32}
    assert torch.equal(velocity(roles, TEACHER), teacher)


def test_no_network_is_left_in_training_mode() -> None:
    roles = Roles(transformer().train(), family("wan"), MIXES["mixed"])
    assert [network.training for network in roles.networks()] == [False, False]

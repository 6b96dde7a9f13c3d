from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pdmd_core.families import family
from pdmd_core.roles import FAKE, TEACHER, Roles, RoleSpec
from tests.helpers.tiny import LATENT_SHAPE, TEXT_FEATURES, randn, randomise, transformer

LORA, FULL = RoleSpec("lora", rank=4, alpha=6.0), RoleSpec("full")
MIXES = {
    "lora": {"high": LORA, "low": LORA, FAKE: LORA},
    "full": {"high": FULL, "low": FULL, FAKE: FULL},
    "mixed": {"high": LORA, "low": LORA, FAKE: FULL},
}
X = randn(2, *LATENT_SHAPE)
SIGMA = torch.tensor([0.9, 0.4])
CONDITIONING = {"prompt_embeds": randn(2, 5, TEXT_FEATURES, seed=1)}


@pytest.fixture(params=MIXES)
def roles(request: pytest.FixtureRequest) -> Roles:
    return Roles(transformer(), family("wan"), MIXES[request.param])


@pytest.fixture
def lora_roles() -> Roles:
    return Roles(transformer(), family("wan"), MIXES["lora"])


def velocity(roles: Roles, role: str) -> Tensor:
    return roles.velocity(role, X, SIGMA, CONDITIONING)


def teacher_output() -> Tensor:
    with torch.no_grad():
        return family("wan").velocity(transformer(), X, SIGMA, CONDITIONING)


def gradients(roles: Roles, role: str) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in roles.named_parameters(role).items()}


# --- what a role computes ---------------------------------------------------


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


# --- who gets gradient ------------------------------------------------------


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


# --- resetting, saving, loading ---------------------------------------------


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


# --- errors -----------------------------------------------------------------


def one_line(error: BaseException) -> str:
    text = str(error.args[0])
    assert len(text.splitlines()) == 1
    return text


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


@pytest.mark.parametrize(
    "use",
    [
        lambda roles: roles.activate("middle"),
        lambda roles: roles.network("middle"),
        lambda roles: velocity(roles, "middle"),
        lambda roles: roles.parameters("middle"),
        lambda roles: roles.set_trainable(["high", "middle"]),
        lambda roles: roles.reset("middle"),
        lambda roles: roles.state_dict("middle"),
        lambda roles: roles.load_state_dict("middle", {}),
    ],
    ids=["activate", "network", "velocity", "parameters", "set_trainable", "reset", "state_dict", "load_state_dict"],
)
def test_an_unknown_role_is_an_error_that_lists_the_known_ones(roles: Roles, use: Callable[[Roles], object]) -> None:
    with pytest.raises(KeyError) as caught:
        use(roles)
    assert "unknown role 'middle'" in one_line(caught.value)
    assert "teacher, high, low, fake" in one_line(caught.value)


def test_the_teacher_takes_no_specification() -> None:
    with pytest.raises(ValueError, match="the teacher is the base network itself"):
        Roles(transformer(), family("wan"), {TEACHER: LORA})


@pytest.mark.parametrize(
    "use",
    [
        lambda roles: roles.parameters(TEACHER),
        lambda roles: roles.set_trainable([TEACHER]),
        lambda roles: roles.reset(TEACHER),
        lambda roles: roles.load_state_dict(TEACHER, {}),
    ],
    ids=["parameters", "set_trainable", "reset", "load_state_dict"],
)
def test_the_teacher_has_no_weights_to_train(roles: Roles, use: Callable[[Roles], object]) -> None:
    with pytest.raises(KeyError, match="no weights of its own"):
        use(roles)


def test_parameters_that_took_the_place_of_others_get_gradient_as_their_role_does(lora_roles: Roles) -> None:
    lora_roles.set_trainable(["high"])
    for module in lora_roles.network(TEACHER).modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    lora_roles.forget_parameters()
    trainable = {role: {p.requires_grad for p in lora_roles.parameters(role)} for role in lora_roles.specs}
    assert trainable == {"high": {True}, "low": {False}, FAKE: {False}}


def test_no_network_is_left_in_training_mode() -> None:
    roles = Roles(transformer().train(), family("wan"), MIXES["mixed"])
    assert [network.training for network in roles.networks()] == [False, False]


def test_the_state_of_a_role_that_trains_carries_no_gradient(roles: Roles) -> None:
    roles.set_trainable(["high", FAKE])
    assert not any(value.requires_grad for role in ("high", FAKE) for value in roles.state_dict(role).values())

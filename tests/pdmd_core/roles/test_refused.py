"""What cannot be asked of roles is an error of one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pdmd_core.families import family
from pdmd_core.roles import TEACHER, Roles
from tests.helpers.role_mixes import LORA, one_line, velocity
from tests.helpers.tiny import transformer


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

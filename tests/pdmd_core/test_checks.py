"""Choices that cannot be are refused by the library itself, in one line that starts with the name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from pdmd_core.method import Objective
from pdmd_core.roles import RoleSpec

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("make", "name", "values"),
    [
        (Objective, "guidance_scale", (0.99, 0, NAN, INF, "4")),
        (Objective, "fake_weighting", ("clamped", None)),
        (Objective, "fake_target", ("bias",)),
        (Objective, "generator_weighting", ("dmd",)),
        (Objective, "score_range", ("whole",)),
        (Objective, "score_shift", (0.0, -1.0, NAN, INF)),
        (Objective, "margin", (-0.1, 1.0, NAN)),
        (Objective, "fake_rollouts", ("all",)),
        (Objective, "expert_rollouts", ("whole", "through")),
        (Objective, "score_draws", (0, 1.5, True)),
        (RoleSpec, "kind", ("lorra",)),
        (RoleSpec, "rank", (0, -1, 4.0, True)),
        (RoleSpec, "alpha", (0.0, -8.0, NAN, INF)),
        (RoleSpec, "targets", ((), ("to_q", "to_q"))),
        (RoleSpec, "components", ((), ("transformer", "transformer"))),
    ],
)
def test_a_value_that_cannot_be_is_one_line(make: Callable[..., Any], name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name}: expected .*, found [^\n]*$"):
            make(**{name: value})


def test_values_at_the_edges_of_their_ranges_are_accepted() -> None:
    Objective(guidance_scale=1, score_shift=1e-9, margin=0)
    RoleSpec(rank=1, alpha=1e-9, targets=("to_q",), components=("transformer", "transformer_2"))

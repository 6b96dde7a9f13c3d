"""What would sample or train wrongly without a word, and is no matter of one module's tests."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdmd_core.families import family
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import Roles, RoleSpec
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.tiny import transformer
from training.config.command_line import UserError
from training.config.sections import RoleSection
from training.loop.optimizers import make_optimizer


@st.composite
def plans(draw: st.DrawFn) -> PhasePlan:
    """Any descending sigmas in one to four phases."""
    steps = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    sigmas = [1.0]
    for ratio in draw(st.lists(st.floats(0.3, 0.99), min_size=sum(steps) - 1, max_size=sum(steps) - 1)):
        sigmas.append(sigmas[-1] * ratio)
    starts = [sum(steps[:k]) for k in range(len(steps))]
    return PhasePlan.from_sigmas([sigmas[a : a + n] for a, n in zip(starts, steps, strict=True)])


@given(plans(), st.integers(0, 9), st.floats(0.001, 1))
def test_no_step_crosses_a_boundary(plan: PhasePlan, more: int, share: float) -> None:
    """Of a plan, of its refinement, and of what the scheduler makes of it in float32: one expert owns a whole step."""
    refined = plan.refined(len(plan.sigmas) + more)
    scheduler = PhasedDMDScheduler.from_plan(plan, refine=True)
    scheduler.set_timesteps(len(plan.sigmas) + more)
    for sigmas in (plan.sigmas, refined.sigmas, scheduler.sigmas[:-1].tolist()):
        assert all(any(math.isclose(b, s, rel_tol=1e-6) for s in sigmas) for b in plan.boundaries)
        for high, low in pairwise([*sigmas, 0.0]):
            inside = low + (high - low) * share
            low_end = low * (1 + 2e-4)  # where the next step begins, within the tolerance of the routing
            if inside > low_end:
                assert plan.phase_index(inside) == plan.phase_index(high)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_smallest_update_of_the_recipe_is_not_lost_on_a_base_in_bfloat16(kind: str) -> None:
    """Adam moves a weight by about lr: 4e-7 is 2e-5 of a weight of 0.02, a hundredth of the spacing of bfloat16."""
    base = transformer().to(torch.bfloat16)
    roles = Roles(base, family("wan"), {"fake": RoleSpec(kind, rank=4, alpha=4.0)})  # type: ignore[arg-type]
    roles.set_trainable(["fake"])
    parameters = roles.parameters("fake")
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=4e-7, betas=(0.0, 0.999), weight_decay=0.0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = [bool((p != b).float().mean() > 0.95) for p, b in zip(parameters, before, strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    rounded = [p.to(torch.bfloat16) for p in before if float(p.abs().mean()) > 0.01]
    lost = [bool((p - torch.tensor(4e-7, dtype=torch.bfloat16) == p).float().mean() > 0.95) for p in rounded]
    assert lost and all(lost), "in bfloat16 it would have been"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_are_not_trained(dtype: torch.dtype) -> None:
    weights = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, dtype=dtype))]
    section = RoleSection(lr=4e-7)
    assert make_optimizer(weights[:1], section, torch.device("cpu"))
    with pytest.raises(UserError, match=r"weights that train are float32, found b?float16: updates of lr 4e-07 would"):
        make_optimizer(weights, section, torch.device("cpu"))

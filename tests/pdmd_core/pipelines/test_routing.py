"""What a network is called with against where the scheduler stands: as exact as the timestep's dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pdmd_core.phases import PhasePlan
from pdmd_core.pipelines.routing import PhaseGuard, Route
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.tiny import transformer

SIGMA = 5 / 6


def call(timestep: Tensor) -> None:
    """At the third of four steps."""
    scheduler = PhasedDMDScheduler.from_plan(PhasePlan.from_steps([2, 2], shift=5.0))
    scheduler.set_begin_index(2)
    PhaseGuard(Route(scheduler), transformer(), frozenset({1})).check((), {"timestep": timestep})


@pytest.mark.parametrize("value", [1000 * SIGMA, SIGMA, 1 - SIGMA])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_timestep_in_any_unit_is_that_of_the_step_within_its_rounding(value: float, dtype: torch.dtype) -> None:
    call(torch.tensor([value, 0.0], dtype=dtype))


@pytest.mark.parametrize(("factor", "dtype"), [(1.002, torch.float32), (0.998, torch.float32), (1.02, torch.bfloat16)])
def test_another_timestep_is_refused(factor: float, dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match="another scheduler walks this pipeline"):
        call(torch.tensor(1000 * SIGMA * factor, dtype=dtype))

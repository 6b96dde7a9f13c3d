"""Schedulers of plans of all kinds."""

from __future__ import annotations

import pytest

from pdmd_core.phases import PhasePlan
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.walks import PLANS


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest) -> PhasePlan:
    return PLANS[request.param]


@pytest.fixture
def scheduler(plan: PhasePlan) -> PhasedDMDScheduler:
    return PhasedDMDScheduler.from_plan(plan)

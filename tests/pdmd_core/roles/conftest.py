"""Roles of LoRA, of full copies and of both."""

from __future__ import annotations

import pytest

from pdmd_core.families import family
from pdmd_core.roles import Roles
from tests.helpers.role_mixes import MIXES
from tests.helpers.tiny import transformer


@pytest.fixture(params=MIXES)
def roles(request: pytest.FixtureRequest) -> Roles:
    return Roles(transformer(), family("wan"), MIXES[request.param])


@pytest.fixture
def lora_roles() -> Roles:
    return Roles(transformer(), family("wan"), MIXES["lora"])

"""A valid experts folder, and the roles that it was written from."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdmd_core.roles import Roles
from tests.helpers.experts_folder import ALPHA, PLAN, RANK
from tests.helpers.tiny import lora_roles, write_lora_experts


@pytest.fixture(scope="module")
def roles() -> Roles:
    return lora_roles(PLAN, RANK, ALPHA)


@pytest.fixture
def folder(tmp_path: Path, roles: Roles) -> Path:
    """A valid experts folder."""
    write_lora_experts(tmp_path / "experts", PLAN, roles)
    return tmp_path / "experts"

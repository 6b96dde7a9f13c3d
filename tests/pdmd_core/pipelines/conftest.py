"""What tests of pipelines share."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["lora", "full"])
def kind(request: pytest.FixtureRequest) -> str:
    """Of the experts."""
    return request.param

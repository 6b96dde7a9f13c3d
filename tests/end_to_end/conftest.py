"""Where the shipped models are."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shipped configs and manifests name paths from the root of the repository."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def teacher() -> Path:
    return Path("training/embedded/models/teacher")


@pytest.fixture
def experts() -> Path:
    return Path("training/embedded/models/experts")

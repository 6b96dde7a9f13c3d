"""One thread, one seed: every test gives the same numbers on every run."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.helpers.garbage import pytest_collection_finish as pytest_collection_finish
from tests.helpers.garbage import pytest_collectstart as pytest_collectstart

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a slow test go first: what several processes come to last is then short."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed, each time; those that were just written count as settled."""
    names, digest = [], hashlib.file_digest

    def counted(file: Any, algorithm: Any) -> Any:
        names.append(Path(file.name).name)
        return digest(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    monkeypatch.setattr("pdmd_core.hashing.SETTLED", 0.0)
    return names

"""A hub over HTTP, clients of it, and experts to push to it and to load from it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.hub import Hub
from tests.helpers.hub_client import Client
from tests.helpers.pushed_experts import PLAN
from tests.helpers.tiny import lora_roles, write_lora_experts


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(autouse=True)
def no_faults(hub: Hub) -> Iterator[None]:
    hub.requests.clear()
    yield
    hub.faults.clear()


@pytest.fixture(scope="session")
def client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """With the token of ``user``."""
    with Client(hub.url, tmp_path_factory.mktemp("home")) as client:
        yield client


@pytest.fixture(scope="session")
def anonymous(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Without a token."""
    with Client(hub.url, tmp_path_factory.mktemp("home"), token=None) as client:
        yield client


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    write_lora_experts(folder, PLAN, lora_roles(PLAN), training={"updates": 3})
    PhasedDMDScheduler.from_plan(PLAN).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """Experts that a test may change."""
    shutil.copytree(written, tmp_path / "experts")
    return tmp_path / "experts"


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """A repository of this test's own."""
    return f"user/{hashlib.sha1(request.node.nodeid.encode()).hexdigest()[:12]}"


@pytest.fixture
def stored(hub: Hub, repo: str, written: Path) -> str:
    """The repository with experts in it, as another client may have put them there."""
    paths = [path for path in written.rglob("*") if path.is_file()]
    content = {path.relative_to(written).as_posix(): path.read_bytes() for path in paths}
    hub.put(repo, {**content, "README.md": b"# card", "large.safetensors": b"not of the manifest"})
    return repo

"""Programs that start at once, and a tiny teacher for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.faults.distillations import SETTINGS, Distillation
from tests.helpers.faults.programs import Warm
from tests.helpers.tiny import save_wan_pipeline
from training.config.schema import with_values


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    server = Warm(tmp_path_factory.mktemp("warm"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "prompts.txt").write_text("a panda\na fox\nan apple\n", encoding="utf-8")
    model = {"path": str(save_wan_pipeline(folder / "teacher")), "height": 16, "width": 16, "max_sequence_length": 12}
    return {**SETTINGS, "model": model, "data": {"prompts": str(folder / "prompts.txt")}}


@pytest.fixture
def distillation(warm: Warm, tiny_settings: dict[str, Any], tmp_path: Path) -> Callable[..., Distillation]:
    """A run that has not started, with changes of the settings."""

    def make(name: str = "run", **changes: Any) -> Distillation:
        return Distillation(warm, tmp_path / name, with_values(tiny_settings, changes))

    return make


@dataclass(frozen=True)
class Uninterrupted:
    """A run in which nothing went wrong."""

    run: Distillation
    results: dict[str, bytes]
    changes: list[str]
    """What it did to its folder, in order."""


@pytest.fixture(scope="session")
def uninterrupted(warm: Warm, tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = Distillation(warm, folder / "run", copy.deepcopy(tiny_settings))
    log = folder / "changes"
    ended = run.run(faults=[run.at("", "none", log=log)])
    assert ended.status == 0, ended.errors
    results = run.results()
    assert "experts/low_noise.safetensors" in results and run.updates() == 6
    return Uninterrupted(run, results, log.read_text("utf-8").splitlines())

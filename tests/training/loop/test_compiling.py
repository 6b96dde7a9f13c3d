"""Regional compilation of a training: the same numbers, and no graph is compiled twice."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.helpers.configs import changed
from training.config.schema import DistillConfig
from training.loop.build import build_run
from training.loop.trainer import Trainer

UPDATES = 4


@pytest.fixture
def with_quick_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are captured as ever and run as they are: what they compute and when they are captured is the matter."""
    quick = partial(nn.Module.compile, backend="eager")
    monkeypatch.setattr(nn.Module, "compile", lambda self: quick(self))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def with_two_phases(config: DistillConfig, **values: Any) -> DistillConfig:
    settings = {"updates": UPDATES, "plan": {"steps": [2, 1], "shift": 3.0}, "memory.gradient_checkpointing": True}
    return changed(config, **settings | values)


def updates_of(trainer: Trainer) -> list[tuple[dict[str, float], int]]:
    """Values of each update, and how many graphs were captured in it."""
    seen = []
    for phase in range(2):
        trainer.progress.phase, trainer.progress.update = phase, 0
        trainer.start_phase()
        for _ in range(UPDATES):
            before = counters["stats"]["unique_graphs"]
            seen.append((trainer.update().values, counters["stats"]["unique_graphs"] - before))
    return seen


def test_blocks_are_compiled_in_the_first_updates_of_a_phase_and_never_again(
    config: DistillConfig, with_quick_backend: None, tmp_path: Path
) -> None:
    config.output_dir.mkdir(parents=True)
    plain = updates_of(Trainer(build_run(with_two_phases(config))))
    compiled = updates_of(Trainer(build_run(with_two_phases(config, compile="regional"))))
    assert [graphs for _, graphs in plain] == [0] * 2 * UPDATES
    graphs = [graphs for _, graphs in compiled]
    assert graphs[0] > 0 and graphs[UPDATES] > 0
    assert sum(graphs[2:UPDATES]) == sum(graphs[UPDATES + 2 :]) == 0
    for (values, _), (wanted, _) in zip(compiled, plain, strict=True):
        for key, value in wanted.items():
            assert values[key] == pytest.approx(value, rel=1e-4), key

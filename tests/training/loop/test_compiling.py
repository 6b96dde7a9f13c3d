"""Regional compilation of a training: the same numbers, and no graph is compiled twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx import GraphModule

from benchmarks.cost.random_training import small_config, small_teacher
from tests.helpers.configs import changed
from training.config.schema import DistillConfig
from training.loop import compiling
from training.loop.build import build_roles, build_run
from training.loop.trainer import Trainer

UPDATES = 4


@pytest.fixture
def with_quick_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are captured as ever and run as they are: what they compute and when they are captured is the matter."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
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


def evaluated(compiled: str, **changes: Any) -> tuple[Tensor, Tensor]:
    """Velocity of an expert, and the gradient of its weights."""
    config = small_config(
        compile=compiled, memory={"gradient_checkpointing": True} | changes.pop("memory", {}), **changes
    )
    torch.manual_seed(0)
    teacher = small_teacher("wan", "tiny", 4)
    roles = build_roles(config, teacher.family, teacher.networks, teacher.routing, torch.device("cpu"))
    expert = config.plan.build().phases[0].name
    roles.set_trainable([expert])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, *teacher.shape, generator=generator)
    given = {name: torch.randn(1, *shape, generator=generator) for name, shape in teacher.conditioning.items()}
    with torch.autograd.graph.save_on_cpu() if config.memory.offload_activations else nullcontext():
        velocity = roles.velocity(expert, x, torch.tensor([0.7]), given)
    velocity.square().sum().backward()
    found = [p.grad.flatten() for p in roles.parameters(expert) if p.grad is not None]
    return velocity.detach(), torch.cat(found)


@pytest.mark.parametrize(
    "changes",
    [
        {"memory": {"swap_blocks": 2, "offload_activations": True}},
        {"model": {"path": "random", "quantization": "int8"}},
    ],
    ids=["host memory", "int8"],
)
def test_what_saves_memory_goes_on_around_compiled_blocks(
    changes: dict[str, Any], with_quick_backend: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = counters["stats"]["unique_graphs"]
    for found, wanted in zip(evaluated("regional", **changes), evaluated("none", **changes), strict=True):
        torch.testing.assert_close(found, wanted)
    assert counters["stats"]["unique_graphs"] > before
    assert "compile: " not in capsys.readouterr().err, "each block is one graph"


def test_blocks_that_cannot_be_compiled_run_as_they_are_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, with_quick_backend: None, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[GraphModule] = []

    def missing(graph: GraphModule, inputs: object) -> GraphModule:
        seen.append(graph)
        raise RuntimeError("no C++ compiler\nfound")

    wanted = evaluated("none")
    monkeypatch.setattr(compiling, "BACKEND", missing)
    found = evaluated("regional")
    assert len(seen) == 1, "the next block does not try"
    for values, others in zip(found, wanted, strict=True):
        assert torch.equal(values, others)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "compile: " in line]
    assert "WanTransformerBlock runs as it is, which is slower: BackendCompilerFailed: " in line
    assert "no C++ compiler found" in line

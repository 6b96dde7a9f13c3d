"""Networks and experts that are idle are off the device: where weights are, and that no number changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pdmd_core.roles import Roles
from tests.helpers.configs import changed
from tests.helpers.families.wan import wan_two_networks
from training.config.schema import ConfigError, DistillConfig
from training.loop.build import build_run
from training.loop.resumption import Resume
from training.loop.trainer import Trainer
from training.memory.offload import OneOnDevice


class Recorded(OneOnDevice):
    """Says what it moves."""

    def __init__(self, frozen: dict[str, list[torch.Tensor]]) -> None:
        self.moves: list[str] = []
        super().__init__(frozen, torch.device("cpu"))

    def _bring(self, name: str) -> None:
        self.moves.append(f"{name} comes")
        super()._bring(name)

    def _send_home(self, name: str) -> None:
        self.moves.append(f"{name} goes")
        super()._send_home(name)


def test_a_network_comes_when_it_is_asked_for_after_the_other_has_gone() -> None:
    networks = {name: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for name in ("first", "second")}
    frozen = {name: [*network.parameters(), *network.buffers()] for name, network in networks.items()}
    before = {name: [t.clone() for t in tensors] for name, tensors in frozen.items()}
    bring = Recorded(frozen)
    assert bring.moves == ["first goes", "second goes"], "at the start both are away"
    bring.moves.clear()
    for name in ("first", "first", "second", "second", "first"):
        bring(name)
    assert bring.moves == ["first comes", "first goes", "second comes", "second goes", "first comes"]
    assert all(torch.equal(t, b) for name in frozen for t, b in zip(frozen[name], before[name], strict=True))


@pytest.fixture
def config(settings_of_run: dict[str, Any], tmp_path: Path) -> DistillConfig:
    wan_two_networks().save_pretrained(tmp_path / "two")
    settings_of_run["model"] |= {"path": str(tmp_path / "two")}
    changes = {
        "plan": {"steps": [1, 1], "shift": 5.0},
        "batch_size": 6,
        "score_groups": 3,
        "updates": 2,
        "memory.gradient_checkpointing": True,
    }
    return changed(settings_of_run, **changes)


def metrics(config: DistillConfig) -> list[dict[str, Any]]:
    text = (config.output_dir / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) | {"time": None} for line in text.splitlines()]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_never_computes_with_the_network_that_is_away(
    config: DistillConfig, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is away is NaN here, so that any use of it, forwards, recomputed or backwards, would be seen."""
    role = {"kind": kind, "rank": 4, "alpha": 4, "lr": 1e-2 if kind == "lora" else 1e-4}
    config = changed(config, generator=role)
    Trainer(build_run(config)).run()
    brought: list[str] = []

    def poison(self: OneOnDevice, name: str) -> None:
        brought.append(name)
        for tensor in self.kept[name]:
            tensor.data = torch.full_like(tensor, float("nan"))

    monkeypatch.setattr(OneOnDevice, "_send_home", poison)
    saving = {"memory.offload_idle_network": True, "memory.guidance_batched": False}
    one = changed(config, output_dir=str(tmp_path / "one"), **saving)
    Trainer(build_run(one)).run()
    assert len(brought) > 10 and set(brought) == {"transformer", "transformer_2"}
    for row, wanted in zip(metrics(one), metrics(config), strict=True):
        assert row["bad_updates"] == 0
        for key in ("generator_loss", "fake_loss", "generator_grad_norm", "fake_grad_norm"):
            assert row[key] == pytest.approx(wanted[key], rel=1e-4), (row["update"], key)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory.offload_idle_network": True, "parallel.sharding": "fsdp"}, "set parallel.sharding to none"),
        (
            {"memory.offload_idle_network": True, "memory.gradient_checkpointing": False},
            "frees memory only with memory.gradient_c",
        ),
        (
            {"memory.offload_idle_network": True, "fake.components": ["transformer_2"]},
            "is for a fake on all networks: leave fake.components out",
        ),
        (
            {"memory.offload_idle_experts": True, "parallel.sharding": "hsdp"},
            "keeps experts whole: set parallel.sharding to none",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(config: DistillConfig, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        changed(config, **changes)
    assert "\n" not in str(error.value)


@pytest.fixture
def device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What comes is a copy, and is NaN once it has gone; an idle expert that computes must have come.

    Returns the roles that computed.
    """
    computed: list[str] = []
    velocity = Roles.velocity

    def bring(self: OneOnDevice, name: str) -> None:
        home = self.at_home[name].flat
        home.place([view.clone() for view in home.views])

    def send_home(self: OneOnDevice, name: str) -> None:
        for tensor, home in zip(self.kept[name], self.at_home[name].flat.views, strict=True):
            if tensor.data_ptr() != home.data_ptr():
                tensor.data.fill_(float("nan"))
            tensor.data = home

    def seen(self: Roles, role: str, *arguments: Any) -> Tensor:
        result = velocity(self, role, *arguments)
        computed.append(role)
        assert isinstance(self.before_role, OneOnDevice)
        for name, parameters in self.before_role.kept.items():
            home = self.before_role.at_home[name].flat.views
            away = [p.data_ptr() == h.data_ptr() for p, h in zip(parameters, home, strict=True)]
            assert set(away) == {name != role}, f"{name} while {role} computes"
        return result

    monkeypatch.setattr(OneOnDevice, "_bring", bring)
    monkeypatch.setattr(OneOnDevice, "_send_home", send_home)
    monkeypatch.setattr(Roles, "velocity", seen)
    return computed


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_idle_experts_are_on_the_device_only_while_they_compute(
    settings_of_run: dict[str, Any], kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Also of a run that is resumed in its second phase, of three."""
    role = {"kind": kind, "rank": 4, "alpha": 4, "lr": 1e-2 if kind == "lora" else 1e-4}
    settings_of_run |= {"plan": {"steps": [1, 1, 1], "shift": 5.0}, "generator": role, "updates": 1}
    together = changed(settings_of_run, **{"memory.gradient_checkpointing": True, "checkpoints.keep": 9})
    Trainer(build_run(together)).run()
    computed = request.getfixturevalue("device_of_its_own")
    apart, resumed = (
        changed(together, output_dir=str(tmp_path / name), **{"memory.offload_idle_experts": True})
        for name in ("apart", "resumed")
    )
    Trainer(build_run(apart)).run()
    shutil.copytree(
        together.output_dir / "checkpoints" / "update-00000001", tmp_path / "resumed/checkpoints/update-00000001"
    )
    Trainer(build_run(resumed, Resume())).run()
    assert {"teacher", "fake", *(phase.name for phase in together.plan.build().phases)} == set(computed)
    assert metrics(apart) == metrics(together)
    assert metrics(resumed) == metrics(together)[1:]
    for path in (together.output_dir / "experts").glob("*.safetensors"):
        wanted = load_file(path)
        for config in (apart, resumed):
            found = load_file(config.output_dir / "experts" / path.name)
            assert all(torch.equal(found[name], value) for name, value in wanted.items())

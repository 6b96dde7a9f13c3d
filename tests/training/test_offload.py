"""One network of a two-network teacher on the device at a time: where weights are, and that no number changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny_families import wan_two_networks
from training.config import ConfigError, DistillConfig, parse_config
from training.offload import OneNetworkOnDevice
from training.trainer import Trainer


class Recorded(OneNetworkOnDevice):
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
    changes = {"plan": {"steps": [1, 1], "shift": 5.0}, "batch_size": 6, "updates": 2, "gradient_checkpointing": True}
    return parse_config(settings_of_run | changes, "test")


def changed(config: DistillConfig, **values: Any) -> DistillConfig:
    return parse_config({**config.model_dump(mode="json"), **values}, "test")


def metrics(config: DistillConfig) -> list[dict[str, Any]]:
    text = (config.output_dir / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_never_computes_with_the_network_that_is_away(
    config: DistillConfig, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is away is NaN here, so that any use of it, forwards, recomputed or backwards, would be seen."""
    role = {"kind": kind, "rank": 4, "alpha": 4, "lr": 1e-2 if kind == "lora" else 1e-4}
    config = changed(config, generator=role)
    Trainer(config).run()
    brought: list[str] = []

    def poison(self: OneNetworkOnDevice, name: str) -> None:
        brought.append(name)
        for tensor in self.frozen[name]:
            tensor.data = torch.full_like(tensor, float("nan"))

    monkeypatch.setattr(OneNetworkOnDevice, "_send_home", poison)
    one = changed(config, offload_idle_network=True, guidance_batched=False, output_dir=str(tmp_path / "one"))
    Trainer(one).run()
    assert len(brought) > 10 and set(brought) == {"transformer", "transformer_2"}
    for row, wanted in zip(metrics(one), metrics(config), strict=True):
        assert row["bad_updates"] == 0
        for key in ("generator_loss", "fake_loss", "generator_grad_norm", "fake_grad_norm"):
            assert row[key] == pytest.approx(wanted[key], rel=1e-4), (row["update"], key)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sharding": "fsdp"}, "set sharding to none"),
        ({"gradient_checkpointing": False}, "frees memory only with gradient_checkpointing"),
    ],
)
def test_what_does_not_go_with_it_is_one_line(config: DistillConfig, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        changed(config, offload_idle_network=True, **changes)
    assert "\n" not in str(error.value)

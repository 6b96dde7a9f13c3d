"""Attention is computed as asked where that runs backwards, and natively otherwise, which is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend

from benchmarks.cost.random_training import small_teacher
from training.loop import attention
from training.loop.attention import set_attention

CPU = torch.device("cpu")


def test_what_does_not_run_here_is_said_and_computed_natively() -> None:
    said = list[str]()
    networks = small_teacher("wan", "tiny", 4).networks.values()
    assert set_attention(networks, "flash", CPU, torch.float32, said.append) == "native"
    assert len(said) == 1 and said[0].startswith("attention: native: flash does not run here (") and "\n" not in said[0]


def test_what_runs_forwards_and_not_backwards_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def forwards(query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return query.detach()

    monkeypatch.setattr(attention, "dispatch_attention_fn", forwards)
    said = list[str]()
    assert set_attention([], "cudnn", CPU, torch.float32, said.append) == "native"
    assert "cudnn does not run here (RuntimeError" in said[0]


def test_what_runs_is_what_networks_compute_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention._NAMES, "flash", "_native_math")  # which a CPU has
    (network,) = small_teacher("wan", "tiny", 4).networks.values()
    said = list[str]()
    with attention_backend("native"):  # diffusers sets it for the process as well; here it is put back
        assert set_attention([network], "flash", CPU, torch.float32, said.append) == "flash"
    assert said == ["attention: flash"]
    backends = {module.processor._attention_backend for module in network.modules() if hasattr(module, "processor")}
    assert {backend.value for backend in backends} == {"_native_math"}

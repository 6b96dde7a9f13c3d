"""Optimizers of roles: AdamW in float32 and in 8 bits, and the state that a resumed run fills."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.optim import Optimizer

from tests.helpers.configs import changed
from training.config.command_line import UserError
from training.config.schema import ConfigError
from training.config.sections import RoleSection
from training.loop.build import build_run
from training.loop.checkpoints import load_tensors, save_checkpoint
from training.loop.optimizers import MOMENTS, make_optimizer, make_state, set_rate
from training.loop.trainer import Trainer

CPU = torch.device("cpu")
KINDS = list(MOMENTS)


def weights() -> list[nn.Parameter]:
    """One of a size that is held in 8 bits, and one that is too small for it."""
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(64, 128)), nn.Parameter(torch.randn(10))]


def optimizer_of(kind: str, parameters: list[nn.Parameter], **settings: object) -> Optimizer:
    section = RoleSection(optimizer=kind, lr=1e-2, **settings)
    return make_optimizer(parameters, section, CPU)


def step(optimizer: Optimizer, parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize(("kind", "tolerance"), [("adamw", 1e-6), ("adamw_8bit", 0.05)])
def test_steps_are_those_of_adamw(kind: str, tolerance: float) -> None:
    found, wanted = weights(), weights()
    start = [p.detach().clone() for p in wanted]
    optimizer = optimizer_of(kind, found, betas=(0.5, 0.9), weight_decay=0.1)
    reference = torch.optim.AdamW(wanted, lr=1e-2, betas=(0.5, 0.9), weight_decay=0.1)
    for seed in range(5):
        step(optimizer, found, seed)
        step(reference, wanted, seed)
    for after, right, before in zip(found, wanted, start, strict=True):
        assert (after - right).norm() <= tolerance * (right - before).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_same_in_every_run_and_take_no_compiler(kind: str) -> None:
    counters.clear()
    runs = []
    for _ in range(2):
        parameters = weights()
        optimizer = optimizer_of(kind, parameters)
        for seed in range(4):
            step(optimizer, parameters, seed)
        runs.append(parameters)
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))
    assert not counters["stats"], "nothing was compiled"


def test_adamw_is_one_kernel_where_there_is_one() -> None:
    assert optimizer_of("adamw", weights()).defaults["fused"]
    assert not make_optimizer(weights(), RoleSection(), torch.device("meta")).defaults["fused"]


@pytest.mark.parametrize("kind", KINDS)
def test_moments_take_the_bytes_that_are_counted(kind: str) -> None:
    parameter = weights()[0]
    optimizer = optimizer_of(kind, [parameter])
    step(optimizer, [parameter], 0)
    taken = 0
    for name in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state[parameter][name]
        parts = [moment.codes, moment.scale] if kind == "adamw_8bit" else [moment]
        taken += sum(part.numel() * part.element_size() for part in parts)
    assert taken == MOMENTS[kind] * parameter.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_can_be_set_and_state_can_be_made_without_a_step(kind: str) -> None:
    moved = weights()
    optimizer = optimizer_of(kind, moved)
    step(optimizer, moved, 0)
    fresh = weights()
    other = optimizer_of(kind, fresh)
    make_state(other)
    assert all(torch.equal(p, q) for p, q in zip(fresh, weights(), strict=True)), "no weight moves"
    assert all(p.grad is None for p in fresh)
    for p, q in zip(moved, fresh, strict=True):
        names = set(optimizer.state[p])
        assert names == set(other.state[q])
        for name in names:
            other.state[q][name].copy_(optimizer.state[p][name])
        q.data.copy_(p.data)
    for one, parameters in ((optimizer, moved), (other, fresh)):
        set_rate(one, 3e-2)
        step(one, parameters, 1)
    assert all(torch.equal(p, q) for p, q in zip(moved, fresh, strict=True)), "goes on as if nothing had happened"
    before = [p.detach().clone() for p in fresh]
    set_rate(other, 0.0)
    step(other, fresh, 2)
    assert all(torch.equal(p, q) for p, q in zip(before, fresh, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_state_goes_through_a_checkpoint(kind: str, tmp_path: Path) -> None:
    moved, fresh = weights(), weights()
    optimizer, other = optimizer_of(kind, moved), optimizer_of(kind, fresh)
    step(optimizer, moved, 0)
    make_state(other)

    def tensors(one: Optimizer, parameters: list[nn.Parameter]) -> dict[str, torch.Tensor]:
        states = {f"{i}/{k}": v for i, p in enumerate(parameters) for k, v in one.state[p].items()}
        return states | {f"{i}": p.detach() for i, p in enumerate(parameters)}

    path = save_checkpoint(tmp_path, 1, tensors(optimizer, moved), {}, keep=1)
    load_tensors(path, tensors(other, fresh))
    for one, parameters in ((optimizer, moved), (other, fresh)):
        step(one, parameters, 1)
    assert all(torch.equal(p, q) for p, q in zip(moved, fresh, strict=True))


def test_8_bits_are_for_whole_weights(settings_of_run: dict[str, Any]) -> None:
    full = {"kind": "full", "optimizer": "adamw_8bit"}
    with pytest.raises(ConfigError, match=r"fake\.optimizer: adamw_8bit is for weights that are whole: use adamw"):
        changed(settings_of_run, **{"fake": full, "parallel.sharding": "fsdp"})
    changed(settings_of_run, fake=full)
    changed(settings_of_run, **{"fake.kind": "lora", "fake.optimizer": "adamw_8bit", "parallel.sharding": "fsdp"})


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"adamw_8bit takes the package torchao .* pip install") as error:
        optimizer_of("adamw_8bit", weights())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [{"fake.optimizer": "adamw_8bit"}, {"model.quantization": "int8"}])
def test_a_missing_library_is_said_before_anything_is_loaded(
    settings_of_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]
) -> None:
    for name in ("torchao", "torchao.optim", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("training.loop.build.load_image_side", lambda *_: pytest.fail("a teacher was loaded"))
    config = changed(settings_of_run, **changes)
    with pytest.raises(UserError, match=r"takes the package torchao .* pip install 'phased-dmd\[low-memory\]'"):
        Trainer(build_run(config))


def test_half_precision_does_not_train() -> None:
    half = [nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))]
    with pytest.raises(UserError, match=r"weights that train are float32, found bfloat16: .* lr 0.01 would vanish"):
        optimizer_of("adamw", half)

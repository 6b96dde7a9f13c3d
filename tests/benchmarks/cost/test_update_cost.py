"""The floor of an update is the calls of networks in it: all of them, as they were, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.cost import update_cost
from benchmarks.cost.random_training import RandomTraining, small_config, small_teacher
from benchmarks.cost.update_cost import MODELS, ObservedRoles, Recording, measure, replay, summary, table
from pdmd_core.evaluations import evaluations_per_update
from pdmd_core.method import Objective
from pdmd_core.roles import FAKE, TEACHER

STILL = {"kind": "lora", "rank": 4, "alpha": 4, "lr": 1e-30, "weight_decay": 0.0}
"""Updates that change nothing, so that a call can be compared with its repetition."""


def training(name: str, phase: int = 0, **changes: Any) -> RandomTraining:
    torch.manual_seed(0)
    config = small_config(**{"generator": STILL, "fake": STILL, "fake_updates": 2, **changes})
    found = RandomTraining(config, small_teacher(name, "tiny", 4), Accelerator(cpu=True), phase, ObservedRoles)
    with torch.no_grad():
        for role in found.roles.specs:  # adapters that do something
            for name, parameter in found.roles.named_parameters(role).items():
                if "lora" in name:
                    parameter.normal_()
    return found


def recorded(of: RandomTraining) -> Recording:
    assert isinstance(of.roles, ObservedRoles)
    with Recording(of.roles) as recording:
        of.update()
    return recording


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("phase", [0, 1])
def test_the_calls_are_the_evaluations_that_the_method_needs(name: str, phase: int) -> None:
    found = training(name, phase, plan={"steps": [1, 1], "shift": 5.0})  # one step: every update needs as many
    calls = recorded(found).calls
    two = name == "wan_two_networks"
    needed = evaluations_per_update(found.training.distiller.plan, phase, Objective(), 2, 1)
    assert len(calls) == sum(needed.values())
    with_gradient = [call.asked for call in calls if call.gradient]
    expert = found.training.expert
    assert [role for role, _ in with_gradient] == [FAKE, FAKE, expert]
    assert sum(role == TEACHER for role, _ in (call.asked for call in calls)) == 1
    if two:
        assert {component for role, component in (call.asked for call in calls) if role == FAKE} <= {
            "transformer",
            "transformer_2",
        }


@pytest.mark.parametrize("changes", [{}, {"fake": {"kind": "full", "lr": 1e-30, "weight_decay": 0.0}}])
@pytest.mark.parametrize("name", ["wan_two_networks", "qwen_image", "z_image"])
def test_the_floor_repeats_the_calls_of_the_update(name: str, changes: dict[str, Any]) -> None:
    found = training(name, 1, **changes)
    outputs: list[list[Tensor]] = []

    def see(network: nn.Module, args: Any, output: Any) -> None:
        first = output[0]
        outputs.append([t.detach().clone() for t in ([first] if isinstance(first, Tensor) else first)])

    assert isinstance(found.roles, ObservedRoles)
    roles = {
        (role, c): found.roles.network(role, c) for role in (TEACHER, *found.roles.specs) for c in found.roles.bases
    }
    for network in {id(n): n for n in roles.values()}.values():
        network.register_forward_hook(see)
    calls = recorded(found).calls
    in_update, outputs[:] = list(outputs), []
    assert replay(calls, found, "cpu") > 0
    assert len(in_update) == len(outputs) == len(calls)
    for expected, repeated in zip(in_update, outputs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, repeated, strict=True))


def test_the_floor_runs_backwards_what_the_update_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    found = training("wan")
    calls = recorded(found).calls
    reached: list[set[str]] = []
    original = torch.autograd.backward

    def backward(*args: Any) -> None:
        original(*args)
        reached.append({r for r in found.roles.specs if any(p.grad is not None for p in found.roles.parameters(r))})

    monkeypatch.setattr(torch.autograd, "backward", backward)
    replay(calls, found, "cpu")
    assert reached == [{FAKE}, {FAKE}, {"high_noise"}]


def test_times_are_those_of_update_and_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts how often it is asked: an update takes 1, a floor 1 for each of its calls."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(update_cost, "clock", lambda device: float(next(ticks)))
    rows = measure(training("wan", plan={"steps": [1, 1], "shift": 5.0}), 2, "cpu")
    assert rows == [{"update": 1.0, "floor": 7.0, "calls": 7, "backwards": 3}] * 2


def test_the_ratio_is_taken_within_a_repetition() -> None:
    rows = [{"update": 2.0, "floor": 1.0}, {"update": 11.0, "floor": 10.0}, {"update": 30.0, "floor": 20.0}]
    found = summary(rows)
    assert found["ratio"]["median"] == 1.5
    assert (found["update"]["median"], found["floor"]["median"], found["repetitions"]) == (11, 10, 3)
    line = table([{"teacher": "wan", "parameters": 98_400_000, "fake": "lora", **found}]).splitlines()[-1]
    assert line == "| wan | 98.4 M | lora | 10 (5.5 to 15) | 11 (6.5 to 20.5) | 1.500 (1.300 to 1.750) |"

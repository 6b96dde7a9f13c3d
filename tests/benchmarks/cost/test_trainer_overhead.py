"""The calls of an update are those of networks in it, as they were, and nothing else; the floor is their arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.cost import trainer_overhead
from benchmarks.cost.random_training import RandomTraining, small_config, small_teacher
from benchmarks.cost.trainer_overhead import (
    MODELS,
    ObservedRoles,
    Recording,
    flops_of,
    measure,
    replay,
    summary,
    table,
)
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
def test_what_is_replayed_repeats_the_calls_of_the_update(name: str, changes: dict[str, Any]) -> None:
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


def test_what_is_replayed_runs_backwards_what_the_update_trains(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_times_are_those_of_update_calls_and_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts how often it is asked: an update takes 1, its calls 1 for each of them."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(trainer_overhead, "clock", lambda device: float(next(ticks)))
    monkeypatch.setattr(trainer_overhead, "rate_of_products", lambda device: 1e6)
    found = training("wan", plan={"steps": [1, 1], "shift": 5.0})
    rows = measure(found, 2, "cpu")
    flops = flops_of(recorded(found).calls, found, "cpu") / 1e6
    assert rows == [{"update": 1.0, "calls": 7.0, "floor": flops, "evaluations": 7}] * 2


def test_operations_are_those_of_products_and_attention_by_hand() -> None:
    """A call without gradient of the tiny Wan: 4 tokens of the picture, 64 of text, width 24, two blocks."""
    found = training("wan")
    call = next(call for call in recorded(found).calls if call.asked[0] == TEACHER)
    network: Any = found.roles.network(*call.asked)
    rows, text = call.kwargs["hidden_states"].shape[0], 64
    linear = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) and "lora" not in n}
    products = 0
    for name, module in linear.items():
        of_text = "text_embedder" in name or ".attn2.to_k" in name or ".attn2.to_v" in name
        tokens = text if of_text else 1 if "condition_embedder" in name else 4
        products += 2 * tokens * module.weight.numel()
    patches = 2 * 4 * network.patch_embedding.weight.numel()
    attention = 2 * sum(4 * 4 * keys * 24 for keys in (4, text))  # two products in each of two blocks
    assert flops_of([call], found, "cpu") == rows * (products + patches + attention)


def test_ratios_are_taken_within_a_repetition() -> None:
    times = [(2.0, 1.0, 0.5), (11.0, 10.0, 5.0), (30.0, 20.0, 10.0)]
    rows = [{"update": update, "calls": calls, "floor": floor} for update, calls, floor in times]
    found = summary(rows)
    assert (found["update / calls"]["median"], found["update / floor"]["median"]) == (1.5, 3.0)
    assert (found["update"]["median"], found["calls"]["median"], found["repetitions"]) == (11, 10, 3)
    line = table([{"teacher": "wan", "parameters": 98_400_000, "fake": "lora", **found}]).splitlines()[-1]
    assert line.startswith(
        "| wan | 98.4 M | lora | 5 (2.75 to 7.5) | 10 (5.5 to 15) | 11 (6.5 to 20.5) | 1.500 (1.300 "
    )

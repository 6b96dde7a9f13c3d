"""What the trainer adds to its network calls, and what these add to arithmetic.

``python benchmarks/cost/trainer_overhead.py`` compares three times of a generator update with its fake updates. Each
repetition times one update of the trainer and then its *calls*: the very calls of networks that it made, with the same
inputs and the same adapters, forwards and backwards, and nothing else (no losses, rollout arithmetic, optimizer,
clipping, data). Their ratio is what the trainer adds. The *floor* has no avoidable work in it: the FLOPs of the matrix
products and attention in the calls that the method needs, at the rate of a large matrix product of the same machine,
measured in the same repetition. Times are processor seconds on a CPU, which other work on the machine changes little,
and seconds on a GPU. Writes docs/benchmarks/trainer_overhead.json and .md: medians and quartiles over repetitions.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from benchmarks.cost.random_training import TEXT_TOKENS, RandomTraining, small_config, small_teacher
from benchmarks.cost.random_wan import finished, machine, spread
from benchmarks.cost.results import write_result
from pdmd_core.arguments import COUNT
from pdmd_core.roles import TEACHER, Roles

ROOT = Path(__file__).resolve().parents[2]
TARGET = 1.10
MODELS = ("wan", "qwen_image", "wan_two_networks", "z_image", "wan_image")
FULL_FAKE = {"kind": "full", "lr": 4e-7}


class ObservedRoles(Roles):
    """Remembers which network was asked for last."""

    asked: tuple[str, str | None] = (TEACHER, None)

    def network(self, role: str, component: str | None = None) -> nn.Module:
        self.asked = (role, component)
        return super().network(role, component)


@dataclass(frozen=True)
class Call:
    """One evaluation of a network."""

    asked: tuple[str, str | None]
    """Role and component."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    gradient: bool
    """Whether it is run backwards too."""


class Recording:
    """The calls of networks while it is entered."""

    def __init__(self, roles: ObservedRoles) -> None:
        self.roles = roles
        self.calls: list[Call] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Recording:
        named = [
            (role, component) for role in [TEACHER, *self.roles.specs] for component in self.roles.components(role)
        ]
        networks = {id(network): network for network in (self.roles.network(*pair) for pair in named)}
        self._handles = [n.register_forward_pre_hook(self._record, with_kwargs=True) for n in networks.values()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append(Call(self.roles.asked, args, kwargs, torch.is_grad_enabled()))


def replay(calls: Sequence[Call], training: RandomTraining, device: str) -> float:
    """Seconds of these calls alone."""
    seconds = 0.0
    for call in calls:
        network = training.roles.network(*call.asked)
        start = clock(device)
        with torch.set_grad_enabled(call.gradient), training.accelerator.autocast():
            found = network(*call.args, **call.kwargs)[0]
        if call.gradient:
            outputs: list[Tensor] = [found] if isinstance(found, Tensor) else list(found)
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        seconds += clock(device) - start
        for role in training.roles.specs:
            for parameter in training.roles.parameters(role):
                parameter.grad = None
    return seconds


def flops_of(calls: Sequence[Call], training: RandomTraining, device: str) -> int:
    """Floating-point operations of matrix products and attention in these calls, forwards and backwards."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others are not counted on a CPU
        replay(calls, training, device)
    return counter.get_total_flops()


def rate_of_products(device: str, dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of a large matrix product, the best of several."""
    side = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        start = clock(device)
        torch.mm(a, b)
        best = max(best, 2 * side**3 / (clock(device) - start))
    return best


def clock(device: str) -> float:
    """Processor seconds of this process on a CPU; seconds, once the work is done, on a GPU."""
    if device == "cpu":
        return time.process_time()
    finished(device)
    return time.perf_counter()


def measure(training: RandomTraining, repetitions: int, device: str) -> list[dict[str, float]]:
    """Times of updates, of their calls alone, and of the arithmetic in these, after one of each to warm up."""
    roles = training.roles
    assert isinstance(roles, ObservedRoles)
    rows, flops = [], 0
    for repetition in range(repetitions + 1):
        with Recording(roles) as recording:
            start = clock(device)
            training.update()
            update = clock(device) - start
        calls = replay(recording.calls, training, device)
        if not repetition:  # every update makes as many calls of as many tokens
            flops = flops_of(recording.calls, training, device)
            continue
        row = {"update": update, "calls": calls, "floor": flops / rate_of_products(device)}
        rows.append(row | {"evaluations": len(recording.calls)})
    return rows


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Spreads of the times and of their ratios in the same repetition."""
    return {
        **{key: spread([row[key] for row in rows]) for key in ("update", "calls", "floor")},
        "update / calls": spread([row["update"] / row["calls"] for row in rows]),
        "update / floor": spread([row["update"] / row["floor"] for row in rows]),
        "repetitions": len(rows),
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results, a line each."""
    lines = [
        "| teacher | parameters | fake | floor, s | calls, s | update, s | update / calls | update / floor |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        cells = [
            f"{v['median']:.3g} ({v['quartile_1']:.3g} to {v['quartile_3']:.3g})"
            for v in (result["floor"], result["calls"], result["update"])
        ]
        for ratio in (result["update / calls"], result["update / floor"]):
            cells.append(f"{ratio['median']:.3f} ({ratio['quartile_1']:.3f} to {ratio['quartile_3']:.3f})")
        count = f"{result['parameters'] / 1e6:.3g} M"
        lines.append(f"| {result['teacher']} | {count} | {result['fake']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=COUNT, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sizes", nargs="+", choices=("tiny", "100M"), default=["100M", "tiny"])
    parser.add_argument(
        "--side", type=COUNT, default=32, help="of the latent; 32 are 256 tokens, more make the ratio smaller"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/trainer_overhead")
    arguments = parser.parse_args()
    device, side = arguments.device, arguments.side
    accelerator = Accelerator(cpu=device == "cpu")
    results: list[dict[str, Any]] = []
    for size in arguments.sizes:
        for name in arguments.models:
            # a full copy of the fake is the paper's recipe, its optimizer the largest part that is no evaluation
            for fake in ("lora", "full") if name == MODELS[0] else ("lora",):
                torch.manual_seed(0)
                teacher = small_teacher(name, size, side, device)
                config = small_config(**({"fake": FULL_FAKE} if fake == "full" else {}))
                count = teacher.parameters
                training = RandomTraining(config, teacher, accelerator, kind=ObservedRoles)
                rows = measure(training, arguments.repetitions, device)
                results.append({"teacher": name, "size": size, "parameters": count, "fake": fake, **summary(rows)})
                print(table(results[-1:]).splitlines()[-1], flush=True)
                write(arguments.output, results, side, device)


def write(path: Path, results: Sequence[Mapping[str, Any]], side: int, device: str) -> None:
    """What was measured so far, as .json and .md."""
    unit = "processor seconds" if device == "cpu" else "seconds"
    about = (
        f"One generator update with its five fake updates (phase 1 of 2, LoRA of rank 16, batch 1, latents of {side} x "
        f"{side}: {side * side // 4} tokens of the picture, {TEXT_TOKENS} of text; {results[0]['repetitions']} "
        f"repetitions); {machine(device)}. *Calls* are its evaluations of networks alone; *floor* is their arithmetic "
        f"at the rate of a large matrix product. Medians in {unit}, quartiles in brackets. Target of update / calls at "
        f"100 M parameters: at most {TARGET:.2f}. Written by `python benchmarks/cost/trainer_overhead.py`, whose head "
        "says what is compared."
    )
    result = {"machine": machine(device), "unit": unit, "side": side, "target": TARGET, "rows": list(results)}
    write_result(path, result, f"# Trainer overhead\n\n{about}\n\n{table(results)}\n")


if __name__ == "__main__":
    main()

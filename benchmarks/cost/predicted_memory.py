"""What the dry run says of memory, against what is there: ``python benchmarks/cost/predicted_memory.py``.

Networks with random weights of the Wan architecture (100 million parameters) on a CPU, one way of saving memory after
the other. *Static* is what weights, gradients and optimizers take at the moment of an optimizer's step: the bytes of
all live tensors, but for those that would wait in host memory. *Optimizer* is the bytes of its states. *Activations*
are the most that the allocator gave out in a step; what would wait in host memory until the backward pass waits in
files here. *Host memory* is the growth of a process that loads the teacher whole, as every process does without
sharding (with it: docs/benchmarks/sharded_loading.md). Writes docs/benchmarks/predicted_memory.json and .md.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from benchmarks.cost import random_wan
from benchmarks.cost.random_training import TEXT_TOKENS, RandomTraining, small_config, small_teacher
from benchmarks.cost.random_wan import machine
from benchmarks.cost.results import write_result
from benchmarks.cost.training_memory import away_bytes, held_bytes
from pdmd_core.families import family
from pdmd_core.roles import Roles
from training.config.schema import DistillConfig, parse_config
from training.data.teacher import TeacherSource, networks_of, pipeline_on_meta
from training.loop.optimizers import MOMENTS
from training.loop.precision import make_accelerator
from training.memory.activations import activation_bytes
from training.memory.block_swap import swapped_blocks
from training.memory.host_memory import flat_bytes
from training.memory.static import static_memory

ROOT = Path(__file__).resolve().parents[2]
TARGET = 0.10
"""Of what is measured."""
SIDE = 16
"""Of the latents: 64 tokens."""
_RECOMPUTED = {"gradient_checkpointing": True}
_LORA_8BIT = {"kind": "lora", "rank": 16, "alpha": 16, "lr": 1e-5, "optimizer": "adamw_8bit"}
_MODEL = {"path": "random", "max_sequence_length": TEXT_TOKENS}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "every role LoRA": ("wan", {}),
    "the fake a full copy": ("wan", {"fake": {"kind": "full", "lr": 4e-7}}),
    "moments in 8 bits": ("wan", {"generator": _LORA_8BIT, "fake": _LORA_8BIT}),
    "the base in int8": ("wan", {"model": {**_MODEL, "quantization": "int8"}}),
    "8 of 10 blocks swapped": ("wan", {"memory": {**_RECOMPUTED, "swap_blocks": 8}}),
    "idle experts in host memory": ("wan", {"memory": {"offload_idle_experts": True}}),
    "one of two networks at a time": (
        "wan_two_networks",
        {
            "memory": {**_RECOMPUTED, "offload_idle_network": True, "micro_batch_size": 1},
            "batch_size": 4,
            "score_groups": 4,
        },
    ),
}
"""Teacher and what is changed of the configuration."""
IN_A_STEP: dict[str, dict[str, Any]] = {
    "every role LoRA": {},
    "the fake a full copy": {"fake": {"kind": "full", "lr": 4e-7}},
    "blocks recomputed": {"memory": _RECOMPUTED},
    "and their inputs in host memory": {"memory": {**_RECOMPUTED, "offload_activations": True}},
    "gradient through two steps": {
        "plan": {"steps": [2], "shift": 5.0},
        "objective": {"fake_rollouts": "whole", "expert_rollouts": "through"},
    },
}
Row = dict[str, Any]


def config_of(changes: dict[str, Any]) -> DistillConfig:
    """One sample, one fake step, two phases of a step."""
    settings = {"model": _MODEL, "plan": {"steps": [1, 1], "shift": 5.0}, "fake_updates": 1}
    return small_config(**{**settings, **changes})


def static_rows(way: str, size: str = "100M") -> list[Row]:
    """Static memory, and that of the optimizers, of a way."""
    name, changes = WAYS[way]
    config = config_of(changes)
    described = small_teacher(name, size, SIDE, "meta")
    plan, specs = config.plan.build(), config.role_specs(described.routing)
    with torch.device("meta"):
        roles = Roles(described.networks, described.family, specs, described.routing)
    predicted = static_memory(config, plan, roles, 1)
    empty = held_bytes("cpu")
    training = RandomTraining(config, small_teacher(name, size, SIDE), make_accelerator("no", "cpu"))
    training.update()  # the moments of the optimizers exist from now on
    phase, held = training.training, list[int]()
    waiting = [flat_bytes(t) for n in swapped_blocks(training.roles, config.memory.swap_blocks) for t in n]
    swapped = sum(waiting) if config.memory.swap_blocks else 0
    for optimizer in phase.optimizers.values():
        optimizer.register_step_pre_hook(
            lambda *_: held.append(held_bytes("cpu") - empty - away_bytes(training.roles) - swapped)
        )
    training.update()
    moments = sum(_bytes(v) for o in phase.optimizers.values() for s in o.state.values() for v in s.values())
    sections = phase.sections.items()
    counted = sum(sum(p.numel() for p in roles.parameters(role)) * MOMENTS[s.optimizer] for role, s in sections)
    return [
        {"what": "static", "way": way, "predicted": predicted.bytes, "measured": max(held)},
        {"what": "optimizer", "way": way, "predicted": counted, "measured": moments},
    ]


def _bytes(value: Any) -> int:
    """Of a state; one that consists of other tensors has theirs."""
    if not isinstance(value, Tensor):
        return 0
    if hasattr(value, "__tensor_flatten__"):
        parts, _ = value.__tensor_flatten__()
        return sum(getattr(value, part).nbytes for part in parts)
    return value.nbytes


def activation_rows(way: str, size: str = "100M") -> list[Row]:
    """Activations of a way, in a step of the fake and in one of the expert."""
    config = config_of(IN_A_STEP[way])
    teacher = small_teacher("wan", size, SIDE)
    network: Any = teacher.networks["transformer"]
    shapes = teacher.family.conditioning_shapes(network.config, TEXT_TOKENS, teacher.shape)
    predicted = activation_bytes(config, teacher.family, network, teacher.shape, shapes, 1)
    training = RandomTraining(config, teacher, make_accelerator("no", "cpu"))
    phase, batch = training.training, training.batches.draw(negative=True)
    renoising, fake = training.batches.renoising(phase.distiller, batch.noise), phase.distiller.fakes[0]
    measured = 0
    with tempfile.TemporaryDirectory() as folder:
        for role in (fake, phase.expert):
            for parameter in training.roles.parameters(role):
                parameter.grad = torch.zeros_like(parameter)
            kept = _in_files(Path(folder)) if config.memory.offload_activations else nullcontext()
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
                with kept:
                    if role == fake:
                        loss = phase.distiller.fake_loss(batch.noise, batch.conditioning, renoising, role)
                    else:
                        rollout = phase.distiller.expert_rollout(batch, 0)
                        loss = phase.distiller.generator_loss(rollout, batch, renoising).loss
                training.roles.activate(role)
                loss.backward()
            del loss
            measured = max(measured, allocated(found.profiler.kineto_results.events()))
    return [{"what": "activations", "way": way, "predicted": predicted, "measured": measured}]


def _in_files(folder: Path) -> saved_tensors_hooks:
    """What is kept for the backward pass is in no memory until then."""
    numbers = itertools.count()

    def away(tensor: Tensor) -> Path:
        path = folder / str(next(numbers))
        save_file({"kept": tensor.detach().clone(memory_format=torch.contiguous_format)}, path)
        return path

    return saved_tensors_hooks(away, lambda path: load_file(path)["kept"])


def allocated(events: Iterable[Any]) -> int:
    """The most bytes that the allocator gave out, of a profile."""
    sizes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(sizes, key=lambda pair: pair[0])))


def save_teacher(folder: Path) -> list[Row]:
    """Write the teacher that is loaded; it gives no rows."""
    pipeline = random_wan.pipeline(20, "cpu")
    pipeline.transformer.to(torch.bfloat16)
    pipeline.save_pretrained(folder)
    return []


def host_rows(folder: Path) -> list[Row]:
    """What a process takes that loads a teacher whole."""
    settings = {"model": {"path": str(folder), "dtype": "bfloat16"}, "plan": {"steps": [2, 2]}}
    settings |= {"data": {"prompts": str(ROOT / "training/prompts/video.txt")}}
    config = parse_config(settings, "predicted_memory.py")
    networks = networks_of(pipeline_on_meta(TeacherSource(str(folder))), family("wan"))
    predicted = static_memory(config, config.plan.build(), Roles(networks, family("wan"), {}), 1).loaded
    gc.collect()
    before = resident()
    network = WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.bfloat16)
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()  # as where files are not mapped
    gc.collect()
    grown = resident() - before
    return [{"what": "host memory", "way": "loaded whole", "predicted": predicted, "measured": grown}]


def resident() -> int:
    """Bytes of this process's own memory; the mapped pages of files are the system's to drop."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(r"^RssAnon:\s+(\d+) kB", text, re.MULTILINE)[0]) * 1024


def apart(make: Callable[..., list[Row]], *arguments: Any) -> list[Row]:
    """Rows that are measured in a fork of this process, which holds nothing else and has never used torch's threads: a
    fork would wait for those for ever. Raises RuntimeError if it fails.
    """
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        return pool.apply(make, arguments)


def table(rows: Sequence[Row]) -> str:
    """A line for each prediction."""
    lines = [
        "| what | of | predicted, MiB | measured, MiB | predicted / measured |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        mib = [f"{row[key] / 2**20:.1f}" for key in ("predicted", "measured")]
        lines.append(f"| {row['what']} | {row['way']} | {' | '.join(mib)} | {row['predicted'] / row['measured']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("10M", "100M"), default="100M")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/predicted_memory")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for make, ways in ((static_rows, list(WAYS)), (activation_rows, list(IN_A_STEP))):
        for way in ways:
            found = apart(make, way, arguments.size)
            rows += found
            print("\n".join(table(found).splitlines()[2:]), flush=True)
    with tempfile.TemporaryDirectory() as name:
        apart(save_teacher, Path(name))
        rows += apart(host_rows, Path(name))
    worst = max(abs(row["predicted"] / row["measured"] - 1) for row in rows)
    about = (
        f"Random weights of the Wan architecture on a CPU; {machine('cpu')}. Target: within {TARGET:.0%}; the worst is "
        f"{worst:.1%} off. Written by `python benchmarks/cost/predicted_memory.py`, whose head says what is compared."
    )
    result = {"machine": machine("cpu"), "target": TARGET, "worst": worst, "rows": rows}
    write_result(arguments.output, result, f"# Predicted memory\n\n{about}\n\n{table(rows)}\n")
    print(table(rows))


if __name__ == "__main__":
    main()

"""What training holds beside the frozen base: ``python benchmarks/cost/training_memory.py``.

The recipes for one GPU, every role an adapter on one frozen base, in the real widths and dtypes of the released models.
Weights are random, and only a few of the equal blocks are built, so that it runs anywhere; one update is made, of small
samples. Held is what weights, gradients and optimizer take at the moment of an optimizer's step: on a CPU the bytes of
all live tensors, but for those that would be off a GPU, on a GPU what its allocator has given out. The base is what of
the teacher is there at a time: of two networks one, where the recipe says so. Adapters and all that belongs to them
grow with the number of blocks, which gives the ratio of the whole model. Peak is the largest held within the update,
activations included (on a CPU: the growth of the process). Writes docs/benchmarks/training_memory.json and .md.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from benchmarks.cost.random_training import RandomTeacher, RandomTraining, released_teacher
from benchmarks.cost.random_wan import machine
from benchmarks.cost.results import write_result
from pdmd_core.arguments import COUNT
from pdmd_core.roles import Roles
from training.config.schema import DistillConfig, load_config
from training.data.teacher import TeacherSource, family_of_pipeline, networks_of, pipeline_on_meta
from training.loop.precision import make_accelerator
from training.memory.offload import OneOnDevice

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("wan2_1_t2v_1_3b", "wan2_1_t2v_14b", "wan2_2_t2v_a14b", "qwen_image")
TARGET = 1.15
SMALL = ["model.height=64", "model.width=64", "model.frames=1", "model.max_sequence_length=16", "fake_updates=1"]
SMALL += ["compile=none"]
"""Samples that cost little, and blocks as they are: what is held does not depend on them."""


def held_bytes(device: str) -> int:
    """Of all live tensors on the device."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # of wrappers (8-bit optimizer states, quantized weights) the tensors inside are counted
        if not issubclass(type(thing), torch.Tensor) or is_traceable_wrapper_subclass(thing):
            continue
        if isinstance(thing, FakeTensor):  # holds nothing
            continue
        if thing.device.type == device:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def away_bytes(roles: Roles) -> int:
    """Of networks and experts that are kept off the device at this moment; where that is the CPU they are live too."""
    return sum(
        tensor.nbytes
        for keeper in (roles.before_use, roles.before_role)
        if isinstance(keeper, OneOnDevice)
        for name, tensors in keeper.kept.items()
        if name != keeper.here
        for tensor in tensors
    )


class Peak:
    """The largest memory since it was made: of the device's tensors, or of the process on a CPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        self.start = self._now("VmRSS")

    def _now(self, field: str) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        (kilobytes,) = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(kilobytes) * 1024

    def bytes(self, held_at_start: int) -> int:
        """held_at_start: of tensors when this was made."""
        if self.device == "cuda":
            return self._now("")
        return held_at_start + self._now("VmHWM") - self.start


def blocks_of(config: DistillConfig) -> tuple[int, int]:
    """How many equal blocks each network of the released model has, and parameters of what is there at a time."""
    pipeline = pipeline_on_meta(TeacherSource(str(config.model.architecture), None, config.model.pipeline))
    networks: list[Any] = list(networks_of(pipeline, family_of_pipeline(pipeline)).values())
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    return networks[0].config.num_layers, max(counts) if config.memory.offload_idle_network else sum(counts)


def measure(config: DistillConfig, teacher: RandomTeacher, accelerator: Accelerator, device: str) -> dict[str, int]:
    """Bytes: base (the teacher's weights), held (at the most in one update), peak (with activations)."""
    sizes = [sum(p.numel() * p.element_size() for p in n.parameters()) for n in teacher.networks.values()]
    one = config.memory.offload_idle_network
    base = max(sizes) if one else sum(sizes)
    before = 0 if one and device != "cpu" else sum(sizes)  # such networks are made off the device
    empty = held_bytes(device) - before  # buffers, and what this process holds besides
    training = RandomTraining(config, teacher, accelerator)

    def held_now() -> int:
        return held_bytes(device) - (away_bytes(training.roles) if device == "cpu" else 0)

    training.update()  # the moments of the optimizers exist from now on
    held: list[int] = []
    for optimizer in training.training.optimizers.values():
        optimizer.register_step_pre_hook(lambda *_: held.append(held_now()))
    peak = Peak(device)
    held_before = held_now()
    training.update()
    return {"base": base, "held": max(held) - empty, "peak": peak.bytes(held_before) - empty}


def scaled(row: Mapping[str, int], whole_base: int, blocks: int, built: int) -> float:
    """Held against the base for the whole model: what is held beside the base is in proportion to the blocks."""
    return 1 + (row["held"] - row["base"]) * blocks / built / whole_base


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each model."""
    lines = [
        "| recipe | blocks | base, GiB | held, GiB | peak, GiB | held / base, all blocks | base of all blocks, GiB |"
    ]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        gib = [f"{row[key] / 2**30:.2f}" for key in ("base", "held", "peak")]
        blocks = f"{row['built']} of {row['blocks']}"
        whole = f"{row['whole_base'] / 2**30:.1f}"
        lines.append(f"| {row['recipe']} | {blocks} | {' | '.join(gib)} | {row['ratio']:.3f} | {whole} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layers", type=COUNT, default=1, help="blocks that are built of each network (default: 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/training_memory")
    arguments, overrides = parser.parse_known_args()
    arguments.output = arguments.output.absolute()
    os.chdir(ROOT)
    device, rows = arguments.device, []
    for model in arguments.models:
        recipe = f"{model}_phased_single_gpu"
        config = load_config(ROOT / f"training/configs/{recipe}.yaml", [*SMALL, *overrides])
        accelerator = make_accelerator(config.precision, device)
        blocks, parameters = blocks_of(config)
        whole_base = parameters * getattr(torch, config.model.dtype).itemsize
        teacher = released_teacher(config, arguments.layers, device)
        found = measure(config, teacher, accelerator, device)
        ratio = scaled(found, whole_base, blocks, arguments.layers)
        row = {"recipe": recipe, "blocks": blocks, "built": arguments.layers, "whole_base": whole_base, "ratio": ratio}
        rows.append({**row, **found})
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        del teacher
        gc.collect()
    about = (
        f"Weights, gradients and optimizer of the recipes for one GPU, every role LoRA; {machine(device)}. Target of "
        f"held against the base: at most {TARGET:.2f}. Written by `python benchmarks/cost/training_memory.py`, whose "
        "head says what the columns are."
    )
    result = {"machine": machine(device), "target": TARGET, "overrides": [*SMALL, *overrides], "rows": rows}
    write_result(arguments.output, result, f"# Training memory\n\n{about}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()

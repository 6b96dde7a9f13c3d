"""A few updates of released models at their own size: ``python benchmarks/cost/full_size.py --device cuda``.

The recipes for one GPU (``training/configs/*_phased_single_gpu.yaml``): networks of the released architecture in the
recipe's dtype, every role an adapter on them, samples of the recipe's size; random weights, which are made on the
device, and random prompts, so nothing is downloaded. For the first and the last phase: seconds of an update (after one
to warm up) and the peak of the device's memory. A model that does not fit is reported as such.

``--rehearse`` does the same with one block of each network and small samples, on any machine, to show that it runs.
Writes docs/benchmarks/full_size.json and .md.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.cost.random_training import RandomTraining, released_teacher
from benchmarks.cost.random_wan import finished, machine
from benchmarks.cost.results import write_result
from benchmarks.cost.training_memory import Peak, held_bytes
from pdmd_core.arguments import COUNT
from training.config.schema import DistillConfig, load_config
from training.loop.dry_run import describe
from training.loop.precision import make_accelerator

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("qwen_image", "wan2_2_t2v_a14b", "wan2_2_i2v_a14b", "wan2_1_t2v_14b", "wan2_1_t2v_1_3b")
REHEARSAL = ["model.height=64", "model.width=64", "model.max_sequence_length=16", "fake_updates=1", "compile=none"]
HONOURED: tuple[str, ...] = (
    *("model", "plan", "objective", "generator", "fake", "memory", "batch_size", "fake_updates", "draws_per_rollout"),
    *("precision", "compile", "attention", "max_grad_norm", "ema_decay", "seed"),
)
"""Sections and keys that decide what an update computes, and what it takes."""
REFUSED = ("model.path", "model.revision", "model.pipeline")
OUT_OF_MEMORY = "out of memory"


def measure(config: DistillConfig, layers: int | None, phase: int, updates: int, device: str) -> dict[str, Any]:
    """Seconds of each update and bytes, of one phase; with ``failed`` where the device has too little memory."""
    accelerator = make_accelerator(config.precision, device)
    row: dict[str, Any] = {"phase": config.plan.build().phases[phase].name}
    peak = Peak(device)
    try:
        teacher = released_teacher(config, layers, device)
        row |= {"parameters": teacher.parameters, "latents": list(teacher.shape)}
        training = RandomTraining(config, teacher, accelerator, phase)
        row |= {"said": training.said} if training.said else {}
        training.update()
        row["held"] = held_bytes(device)
        seconds = []
        for _ in range(updates):
            start = time.perf_counter()
            training.update()
            finished(device)
            seconds.append(time.perf_counter() - start)
        row |= {"seconds": seconds, "peak": peak.bytes(0)}
    except torch.OutOfMemoryError as error:
        row["failed"] = f"{OUT_OF_MEMORY}: {' '.join(str(error).split())[:200]}"
    return row


def recipe_of(model: str, overrides: Sequence[str]) -> DistillConfig:
    """The recipe for one GPU."""
    return load_config(ROOT / f"training/configs/{model}_phased_single_gpu.yaml", overrides)


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse keys that decide nothing of an update on random weights.

    Raises:
        ValueError: Naming the key, in a line.
    """
    for override in overrides:
        key, equals, _ = override.partition("=")
        honoured = key in HONOURED or (key.partition(".")[0] in HONOURED and key not in REFUSED)
        if not (equals and honoured):
            raise ValueError(
                f"{override}: expected key=value of {', '.join(HONOURED)}, which decide what an update computes here "
                f"(--updates says how many; {', '.join(REFUSED)} and all other keys change nothing)"
            )


def needed(config: DistillConfig) -> str:
    """What the dry run says that weights, gradients and optimizer take."""
    (line,) = [line for line in describe(config).splitlines() if line.strip().startswith("all ")]
    return " ".join(line.split()[1:3]).rstrip(":")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each phase of each model."""
    columns = ["model", "phase", "parameters", "latents", "seconds an update", "held, GiB", "peak, GiB"]
    lines = [f"| {' | '.join(columns)} |", "| --- | --- | ---: | --- | ---: | ---: | ---: |"]
    for row in rows:
        count = f"{row['parameters'] / 1e9:.3g} G" if "parameters" in row else ""
        latents = "x".join(map(str, row.get("latents", [])))
        if "failed" in row:
            cells = [OUT_OF_MEMORY, "", ""]
        else:
            low, high = min(row["seconds"]), max(row["seconds"])
            cells = [f"{statistics.median(row['seconds']):.3g} ({low:.3g} to {high:.3g})"]
            cells += [f"{row[key] / 2**30:.2f}" for key in ("held", "peak")]
        lines.append(f"| {row['model']} | {row['phase']} | {count} | {latents} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(
    rows: Sequence[Mapping[str, Any]], needs: Mapping[str, str], rehearsed: bool, device: str, updates: int
) -> str:
    """The table and what it stands for."""
    if rehearsed:
        about = (
            "**There is no table of a GPU here: none was at hand.** What follows is a rehearsal on "
            f"{machine(device)} with one block of each network and small samples: it shows that the script runs, and "
            "its times and bytes say nothing of the real models. On a GPU, `python benchmarks/cost/full_size.py "
            "--device cuda` replaces this page."
        )
    else:
        about = (
            f"{machine(device)}; {updates} updates after one to warm up, medians, lowest and highest in brackets. "
            "Random weights, one sample. Written by `python benchmarks/cost/full_size.py`."
        )
    static = [
        "| model | weights, gradients, optimizer |",
        "| --- | ---: |",
        *(f"| {m} | {n} |" for m, n in needs.items()),
    ]
    return "\n\n".join(
        [
            "# Full size",
            about,
            table(rows),
            "What the real models hold before activations, by the dry run of the recipes for one GPU:",
            "\n".join(static) + "\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS[:2]))
    parser.add_argument("--updates", type=COUNT, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rehearse", action="store_true", help="one block of each network, small samples")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/full_size")
    arguments, overrides = parser.parse_known_args()
    arguments.output = arguments.output.absolute()
    os.chdir(ROOT)
    try:
        check_overrides(overrides)
    except ValueError as error:
        parser.error(str(error))
    device, rehearse = arguments.device, arguments.rehearse
    if device == "cpu" and not rehearse:
        parser.error("full size is for a GPU (--device cuda); --rehearse shows on a CPU that it runs")
    rows: list[dict[str, Any]] = []
    needs: dict[str, str] = {}
    for model in arguments.models:
        needs[model] = needed(recipe_of(model, overrides))
        clips = recipe_of(model, overrides).model.frames > 1
        small = [*REHEARSAL, *(["model.frames=5"] if clips else [])] if rehearse else []
        config = recipe_of(model, [*small, *overrides])
        for phase in sorted({0, len(config.plan.build()) - 1}):
            row = measure(config, 1 if rehearse else None, phase, arguments.updates, device)
            rows.append({"model": model, **row})
            print(table(rows[-1:]).splitlines()[-1], row.get("failed", ""), flush=True)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    result = {"machine": machine(device), "rehearsal": rehearse, "overrides": overrides, "needs": needs, "rows": rows}
    write_result(arguments.output, result, page(rows, needs, rehearse, device, arguments.updates))


if __name__ == "__main__":
    main()

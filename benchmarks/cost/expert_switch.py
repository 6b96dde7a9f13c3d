"""What switching experts costs against a forward of the network: ``python benchmarks/cost/expert_switch.py``.

A random Wan network of 100 million parameters with two experts, LoRA of rank 64 and full. Each repetition times, in
turn, one bare forward (no hooks) and all that a phased pipeline adds to a forward: taking the network, which switches,
and the check of the hook; once where the expert changes and once where it stays. Writes
docs/benchmarks/expert_switch.json and .md: medians and quartiles of times, and of their ratio in the same repetition.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.cost.random_wan import PLAN, finished, inputs, machine, pipeline, spread, write_random_experts
from pdmd_core.pipelines import attach_experts

ROOT = Path(__file__).resolve().parents[2]
ROWS = {
    ("lora", True): "LoRA rank 64, the expert changes",
    ("lora", False): "LoRA rank 64, the expert stays",
    ("full", True): "full, the expert changes",
    ("full", False): "full, the expert stays",
}


@torch.no_grad()
def measure(kind: str, layers: int, side: int, repetitions: int, device: str) -> dict[bool, list[tuple[float, float]]]:
    """(seconds of a forward, seconds of switching) of every repetition, by whether the expert changes."""
    pipe = pipeline(layers, device)
    with tempfile.TemporaryDirectory() as folder:
        attach_experts(pipe, write_random_experts(Path(folder), pipe.transformer, kind))
    tensors, scheduler = inputs(side, device), pipe.scheduler
    pipe.phased.running = True  # as inside a call of the pipeline
    scheduler.set_timesteps(device=device)
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for repetition in range(repetitions + 1):
        for changes, steps in ((True, (1, 2)), (False, (2, 3))):
            scheduler.set_begin_index(steps[0])
            _ = pipe.transformer
            call = {
                "hidden_states": tensors["latents"],
                "timestep": scheduler.timesteps[steps[1]].expand(1),
                "encoder_hidden_states": tensors["prompt_embeds"],
            }
            finished(device)
            start = time.perf_counter()
            scheduler.set_begin_index(steps[1])
            network = pipe.transformer
            for hook in network._forward_pre_hooks.values():
                hook(network, (), call)
            switched = time.perf_counter()
            network.forward(**call)
            finished(device)
            if repetition:  # the first one warms up
                found[changes].append((time.perf_counter() - switched, switched - start))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--side", type=int, default=16, help="of the latent; 16 is a picture of 128 pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/expert_switch")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for kind in ("lora", "full"):
        found = measure(kind, arguments.layers, arguments.side, arguments.repetitions, arguments.device)
        for changes, times in found.items():
            rows.append(
                {
                    "experts": ROWS[kind, changes],
                    "forward_ms": spread([1000 * forward for forward, _ in times]),
                    "switching_ms": spread([1000 * switching for _, switching in times]),
                    "percent_of_forward": spread([100 * switching / forward for forward, switching in times]),
                }
            )
    parameters = sum(p.numel() for p in pipeline(arguments.layers, "cpu").transformer.parameters())
    lines = [
        f"{parameters / 1e6:.0f} million parameters, latents of {arguments.side} x {arguments.side}, "
        f"{arguments.repetitions} repetitions, plan of {len(PLAN.sigmas)} steps; {machine(arguments.device)}. Medians, "
        "quartiles in brackets. Written by `python benchmarks/cost/expert_switch.py`.",
        "",
        "| experts | forward, ms | switching, ms | of the forward |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [
            f"{v['median']:.{digits}f}{unit} ({v['quartile_1']:.{digits}f} to {v['quartile_3']:.{digits}f})"
            for v, digits, unit in (
                (row["forward_ms"], 1, ""),
                (row["switching_ms"], 3, ""),
                (row["percent_of_forward"], 3, " %"),
            )
        ]
        lines.append(f"| {row['experts']} | {' | '.join(cells)} |")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"parameters": parameters, "machine": machine(arguments.device), "side": arguments.side, "rows": rows}
    arguments.output.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    arguments.output.with_suffix(".md").write_text(
        "# Switching experts\n\n" + "\n".join(lines) + "\n", encoding="utf-8"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()

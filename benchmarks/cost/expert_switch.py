"""What switching experts costs against a forward of the network: ``python benchmarks/cost/expert_switch.py``.

A random Wan network of 100 million parameters with two experts: LoRA of rank 64 as adapters and merged, and full. Each
repetition times, in turn, one bare forward (no hooks) and all that a phased pipeline adds to a forward: taking the
network, which switches, and the check of the hook; once where the expert changes and once where it stays. Writes
docs/benchmarks/expert_switch.json and .md: what is resident, medians and quartiles of times (on a CPU those of the
processor), and of their ratio in the same repetition.
"""

from __future__ import annotations

import argparse
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
from benchmarks.cost.results import write_result
from pdmd_core.arguments import COUNT
from pdmd_core.pipelines import attach_experts
from pdmd_core.pipelines.merging import Merge

ROOT = Path(__file__).resolve().parents[2]
EXPERTS: dict[str, tuple[str, Merge]] = {
    "LoRA rank 64": ("lora", False),
    "LoRA rank 64, merged in place": ("lora", True),
    "LoRA rank 64, merged into copies": ("lora", "copies"),
    "full": ("full", False),
}
RESIDENT = {
    "LoRA rank 64": "the base and both adapters",
    "LoRA rank 64, merged in place": "one network; a copy of the base in host memory",
    "LoRA rank 64, merged into copies": "the base, and merged weights of both phases",
    "full": "both networks",
}
"""What is on the device during the switch."""


@torch.no_grad()
def measure(
    kind: str, merge: Merge, layers: int, heads: int, side: int, repetitions: int, device: str
) -> dict[bool, list[tuple[float, float]]]:
    """(seconds of a forward, seconds of switching) of every repetition, by whether the expert changes."""
    pipe = pipeline(layers, device, heads)
    with tempfile.TemporaryDirectory() as folder:
        attach_experts(pipe, write_random_experts(Path(folder), pipe.transformer, kind), merge=merge)
    clock = time.process_time if device == "cpu" else time.perf_counter
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
            start = clock()
            scheduler.set_begin_index(steps[1])
            network = pipe.transformer
            for hook in network._forward_pre_hooks.values():
                hook(network, (), call)
            finished(device)
            switched = clock()
            network.forward(**call)
            finished(device)
            if repetition:  # the first one warms up
                found[changes].append((clock() - switched, switched - start))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=COUNT, default=20)
    parser.add_argument("--layers", type=COUNT, default=10)
    parser.add_argument("--heads", type=COUNT, default=12, help="of 64 channels each; 80 are the width of 14B")
    parser.add_argument("--side", type=COUNT, default=16, help="of the latent; 16 is a picture of 128 pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/expert_switch")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, (kind, merge) in EXPERTS.items():
        settings = arguments.layers, arguments.heads, arguments.side, arguments.repetitions, arguments.device
        found = measure(kind, merge, *settings)
        for changes, times in found.items():
            rows.append(
                {
                    "experts": f"{name}, the expert {'changes' if changes else 'stays'}",
                    "device": arguments.device,
                    "resident": RESIDENT[name],
                    "forward_ms": spread([1000 * forward for forward, _ in times]),
                    "switching_ms": spread([1000 * switching for _, switching in times]),
                    "percent_of_forward": spread([100 * switching / forward for forward, switching in times]),
                }
            )
    parameters = sum(p.numel() for p in pipeline(arguments.layers, "cpu", arguments.heads).transformer.parameters())
    lines = [
        f"{parameters / 1e6:.0f} million parameters, latents of {arguments.side} x {arguments.side}, "
        f"{arguments.repetitions} repetitions, plan of {len(PLAN.sigmas)} steps; {machine(arguments.device)}. Medians, "
        "quartiles in brackets. Written by `python benchmarks/cost/expert_switch.py`.",
        "",
        "| experts | device | resident there | forward, ms | switching, ms | of the forward |",
        "| --- | --- | --- | ---: | ---: | ---: |",
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
        lines.append(f"| {row['experts']} | {row['device']} | {row['resident']} | {' | '.join(cells)} |")
    result = {"parameters": parameters, "machine": machine(arguments.device), "side": arguments.side, "rows": rows}
    write_result(arguments.output, result, "# Switching experts\n\n" + "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

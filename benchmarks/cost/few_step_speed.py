"""Four steps of phase experts against forty of the base with guidance: ``python benchmarks/cost/few_step_speed.py``.

One pipeline class, one random Wan network of 100 million parameters and experts of its size; the base walks 40 steps
with guidance (two forwards a step, 80 in all), the experts 4 without (4 forwards). Each repetition times in turn a call
of the base, of full experts, of LoRA experts as adapters (their low-rank products are extra work) and of LoRA experts
that are merged as they take their turns. A call is given text features and noise and returns latents: it is the
denoising loop with every switch and restoration, without text encoding and decoding, which do not depend on the number
of steps. Writes docs/benchmarks/few_step_speed.json and .md: what is resident, medians and quartiles of times (on a CPU
those of the processor, which other programs do not change), and of the speed-up in the same repetition.
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
from pdmd_core.experts.lora.changes import LowRank
from pdmd_core.pipelines import attach_experts
from pdmd_core.pipelines.merging import Merge, MergedExperts

ROOT = Path(__file__).resolve().parents[2]
BASE, FULL = "base, 40 steps with guidance", "full experts, 4 steps"
EXPERTS: dict[str, tuple[str, int, Merge]] = {
    FULL: ("full", 0, False),
    "LoRA experts of rank 16, 4 steps": ("lora", 16, False),
    "LoRA experts of rank 64, 4 steps": ("lora", 64, False),
    "LoRA experts of rank 64, merged in place, 4 steps": ("lora", 64, True),
    "LoRA experts of rank 64, merged into copies, 4 steps": ("lora", 64, "copies"),
}


def resident(pipe: Any) -> tuple[int, int]:
    """Bytes of weights on the device, and of what merging keeps in host memory."""
    attachment = getattr(pipe, "phased", None)
    networks = (attachment and attachment.networks) or [pipe.transformer]
    held = sum(p.numel() * p.element_size() for network in networks for p in network.parameters())
    host = 0
    for switch in attachment.switches.values() if attachment else ():
        turns = switch.differences
        if isinstance(turns, MergedExperts):
            held += sum(value.nbytes for values in turns.of_phase.values() for value in values.values())
            host += 0 if turns.copies else sum(value.nbytes for value in turns.base.values())
            changes = [c for phase in turns.changes.values() for found in phase.values() for c in found]
            host += sum(c.down.nbytes + c.up.nbytes for c in changes if isinstance(c, LowRank))
    return held, host


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=COUNT, default=5)
    parser.add_argument("--layers", type=COUNT, default=10)
    parser.add_argument("--heads", type=COUNT, default=12, help="of 64 channels each; 80 are the width of 14B")
    parser.add_argument("--side", type=COUNT, default=16, help="of the latent; 16 is a picture of 128 pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/few_step_speed")
    arguments = parser.parse_args()
    device, side = arguments.device, arguments.side
    pipes: dict[str, tuple[Any, dict[str, Any]]] = {
        BASE: (pipeline(arguments.layers, device, arguments.heads), {"num_inference_steps": 40, "guidance_scale": 5.0})
    }
    for name, (kind, rank, merge) in EXPERTS.items():
        pipe = pipeline(arguments.layers, device, arguments.heads)
        with tempfile.TemporaryDirectory() as folder:
            attach_experts(pipe, write_random_experts(Path(folder), pipe.transformer, kind, rank), merge=merge)
        pipes[name] = (pipe, {})  # steps and guidance of the experts are the default
    clock = time.process_time if device == "cpu" else time.perf_counter
    forwards, seconds = dict.fromkeys(pipes, 0), {name: list[float]() for name in pipes}
    for name, (pipe, _) in pipes.items():
        for network in pipe.phased.networks if name == FULL else [pipe.transformer]:

            def count(*_: Any, name: str = name) -> None:
                forwards[name] += 1

            network.register_forward_hook(count)
    call = {"height": 8 * side, "width": 8 * side, "num_frames": 1, "output_type": "latent"}
    for repetition in range(arguments.repetitions + 1):
        for name, (pipe, how) in pipes.items():
            more = {"num_inference_steps": 2} if name == BASE and not repetition else {}
            finished(device)
            start = clock()
            pipe(**inputs(side, device, repetition), **call, **{**how, **more})
            finished(device)
            if repetition:  # the first one warms up
                seconds[name].append(clock() - start)
                print(f"{name}: {seconds[name][-1]:.2f} s", flush=True)
            else:
                forwards[name] = 0
    held = {name: resident(pipe) for name, (pipe, _) in pipes.items()}
    whole = held[BASE][0]
    rows = [
        {
            "what": name,
            "device": device,
            "on_device": held[name][0] / whole,
            "in_host_memory": held[name][1] / whole,
            "forwards": forwards[name] // arguments.repetitions,
            "seconds": spread(seconds[name]),
            "times_faster": spread([base / own for base, own in zip(seconds[BASE], seconds[name], strict=True)]),
        }
        for name in pipes
    ]
    parameters = sum(p.numel() for p in pipes[BASE][0].transformer.parameters())
    lines = [
        f"{parameters / 1e6:.0f} million parameters, latents of {side} x {side}, {arguments.repetitions} repetitions, "
        f"{len(PLAN)} experts; {machine(device)}. The denoising loop, without text encoding and decoding. Seconds are "
        f"{'those of the processor' if device == 'cpu' else 'of the clock'}; medians, quartiles in brackets. Resident "
        "are weights on the device, and what is kept in host memory beside them, in units of the base. Written by "
        "`python benchmarks/cost/few_step_speed.py`.",
        "",
        "| | device | resident | in host memory | forwards | seconds | times faster |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [
            f"{v['median']:.2f} ({v['quartile_1']:.2f} to {v['quartile_3']:.2f})"
            for v in (row["seconds"], row["times_faster"])
        ]
        kept = f"{row['device']} | {row['on_device']:.2f} | {row['in_host_memory']:.2f}"
        lines.append(f"| {row['what']} | {kept} | {row['forwards']} | {' | '.join(cells)} |")
    result = {"parameters": parameters, "machine": machine(device), "side": side, "rows": rows}
    write_result(arguments.output, result, "\n".join(["# Few steps", "", *lines]) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

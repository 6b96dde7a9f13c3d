"""Several processes against one: ``python benchmarks/cost/weak_scaling.py``.

Each process has its own samples, gradients are averaged. In one run (torchrun) three ways to train are timed in turn,
many times: the first process alone while the others wait; all at once, each for itself; all together. The second is
what the machine takes for running them at once (caches, memory, other work on it, fewer processors than processes), so
the cost of training together is the time of the third over that of the second. The cases are a network of which every
process holds all, on two processes, and a teacher of two networks in shards (FSDP2), on one, two and four. Wall
seconds of an update on the slowest process. Writes docs/benchmarks/weak_scaling.json and .md: medians and quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.cost.random_training import RandomTraining, small_config, small_teacher
from benchmarks.cost.random_wan import finished, machine, spread
from benchmarks.cost.results import write_result
from pdmd_core.arguments import COUNT
from training.distributed.sharding import mesh_of

ROOT = Path(__file__).resolve().parents[2]
ALONE, APART, TOGETHER = "alone", "apart", "together"
WAYS = (ALONE, APART, TOGETHER)
RESULT = "result "
CASES = (
    ("wan", "none", 2),
    ("wan_two_networks", "fsdp", 1),
    ("wan_two_networks", "fsdp", 2),
    ("wan_two_networks", "fsdp", 4),
)
"""Teacher, sharding of all that train together, processes."""


class OneProcess:
    """What training asks of an Accelerator, for a process that trains for itself."""

    num_processes, process_index = 1, 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()

    def reduce(self, value: Tensor, _: str) -> Tensor:
        return value


def worker(arguments: argparse.Namespace) -> None:
    """One of the processes; the first prints the seconds of every round."""
    together = Accelerator(cpu=arguments.device == "cpu")
    apart: Any = OneProcess(together.device)
    trainings: dict[str, RandomTraining] = {}
    for accelerator, ways in ((apart, (ALONE, APART)), (together, (TOGETHER,))):
        torch.manual_seed(0)
        teacher = small_teacher(arguments.model, arguments.size, arguments.side, str(together.device))
        batch = arguments.batch * accelerator.num_processes
        sharding = arguments.sharding if accelerator is together else "none"
        config = small_config(
            batch_size=batch,
            fake_updates=arguments.fake_updates,
            parallel={"sharding": sharding},
            plan={"steps": [1, 1], "shift": 5.0},  # every update makes as many evaluations
        )
        mesh = mesh_of(config, together.device, accelerator.num_processes)
        training = RandomTraining(config, teacher, accelerator, mesh=mesh)
        training.update()
        trainings |= dict.fromkeys(ways, training)
    for _ in range(arguments.rounds):
        seconds = {}
        for way in WAYS:
            together.wait_for_everyone()
            start = time.perf_counter()
            if way != ALONE or together.is_main_process:
                trainings[way].update()
                finished(together.device.type)
            seconds[way] = time.perf_counter() - start
        own = torch.tensor([[seconds[way] for way in WAYS]], dtype=torch.float64, device=together.device)
        slowest = together.gather(own).amax(dim=0).tolist()
        if together.is_main_process:
            print(f"\n{RESULT}{json.dumps(dict(zip(WAYS, slowest, strict=True)))}", flush=True)


def results_of(output: str) -> list[dict[str, float]]:
    """The rounds that a worker printed."""
    return [json.loads(line.removeprefix(RESULT)) for line in output.splitlines() if line.startswith(RESULT)]


def run(options: Sequence[str], rounds: int, processes: int = 2) -> list[dict[str, float]]:
    """Seconds of an update each way, by round. Raises RuntimeError with the end of what failed workers printed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = [str(ROOT / "benchmarks/cost/weak_scaling.py"), "--worker", f"--rounds={rounds}", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *script], capture_output=True, text=True, env=environment)
    found = results_of(done.stdout)
    if done.returncode or len(found) != rounds:
        raise RuntimeError(f"{len(found)} of {rounds} rounds; {done.stderr[-3000:]}")
    return found


def summary(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Spreads over rounds of the seconds of an update, and of ratios within a round."""
    return {
        **{way: spread([one[way] for one in rounds]) for way in WAYS},
        "together / alone": spread([one[TOGETHER] / one[ALONE] for one in rounds]),
        "together / apart": spread([one[TOGETHER] / one[APART] for one in rounds]),
        "rounds": len(rounds),
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The three ways and their ratio, a line for each case."""
    lines = [
        "| teacher | sharding | processes | one alone, s | each for itself, s | together, s | together / apart |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        spreads = [result["summary"][key] for key in (*WAYS, "together / apart")]
        cells = [f"{v['median']:.3g} ({v['quartile_1']:.3g} to {v['quartile_3']:.3g})" for v in spreads]
        lines.append(f"| {result['model']} | {result['sharding']} | {result['processes']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=COUNT, default=10)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--sharding", help=argparse.SUPPRESS)
    parser.add_argument("--size", default="100M")
    parser.add_argument("--side", type=COUNT, default=16, help="of the latent; 16 are 64 tokens")
    parser.add_argument("--batch", type=COUNT, default=1, help="samples of each process (default: 1)")
    parser.add_argument("--fake_updates", type=COUNT, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/weak_scaling")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    settings = {name: getattr(arguments, name) for name in ("size", "side", "batch", "fake_updates", "device")}
    before, results = os.getloadavg()[0], list[dict[str, Any]]()
    for model, sharding, processes in CASES:
        case = {"model": model, "sharding": sharding, **settings}
        rounds = run([f"--{name}={value}" for name, value in case.items()], arguments.rounds, processes)
        case |= {"processes": processes, "summary": summary(rounds), "rounds": rounds}
        results.append(case)
        print(table(results[-1:]).splitlines()[-1], flush=True)
    load = (before + os.getloadavg()[0]) / 2
    about = (
        f"An update ({settings['size']}) with {settings['fake_updates']} fake update(s), {settings['batch']} sample(s) "
        f"of {settings['side'] ** 2 // 4} tokens on each process, one thread each; {machine(settings['device'])}, "
        f"{os.cpu_count()} processors, {arguments.rounds} rounds, {load:.0f} processes wanted to run on average. "
        "Written by `python benchmarks/cost/weak_scaling.py`, whose head says what is compared."
    )
    data = {"machine": machine(settings["device"]), "settings": settings, "cases": results}
    write_result(arguments.output, data, f"# Weak scaling\n\n{about}\n\n{table(results)}\n")


if __name__ == "__main__":
    main()

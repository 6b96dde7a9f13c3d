"""Host memory while a base is loaded into shards: ``python benchmarks/cost/sharded_loading.py``.

A random base of the Wan architecture in bfloat16 is loaded by 1, 2 and 4 processes on CPUs (gloo), where shards are in
host memory. Each process reads its own rows of every weight, or, for comparison, loads all of it and keeps its shards.
What a process takes is the growth of its private memory (RssAnon; the mapped pages of files are the system's to drop):
at the end, and at most on the way. Predicted is what a dry run says of the teacher on each GPU. Writes
docs/benchmarks/sharded_loading.json and .md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from diffusers import WanPipeline, WanTransformer3DModel
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.cost import random_wan
from benchmarks.cost.results import write_result
from benchmarks.cost.weak_scaling import RESULT, results_of
from pdmd_core.arguments import COUNT
from pdmd_core.families import TeacherRouting, family
from pdmd_core.roles import Roles
from training.config.schema import parse_config
from training.data.teacher import TeacherSource, networks_of, pipeline_on_meta
from training.data.weight_files import WeightFiles
from training.distributed.sharding import shard_roles
from training.memory.static import static_memory

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = (1, 2, 4)
WAYS = {"rows": "own rows of each weight", "whole": "all of it, then shards"}


def private() -> int:
    """Bytes of this process's private memory."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(r"^RssAnon:\s+(\d+) kB", text, re.MULTILINE)[0]) * 1024


class Most(threading.Thread):
    """Looks at the private memory of this process until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self._stop_asked = 0, threading.Event()

    def run(self) -> None:
        """Look every two milliseconds."""
        while not self._stop_asked.wait(0.002):
            self.bytes = max(self.bytes, private())

    def stop(self) -> int:
        """The most that there was."""
        self._stop_asked.set()
        self.join()
        return max(self.bytes, private())


def worker(folder: Path, way: str) -> None:
    """One process: load, and print what that took."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    source = TeacherSource(str(folder))
    files = WeightFiles(source, networks_of(pipeline_on_meta(source), family("wan")), torch.bfloat16)
    gc.collect()
    before, most = private(), Most()
    most.start()
    if way == "rows":
        networks: Any = files.hollow()
    else:
        networks = {"transformer": WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.bfloat16)}
        for network in networks.values():
            network._apply(torch.clone)  # as where files are not mapped, or change their dtype
    roles = Roles(networks, family("wan"), {}, TeacherRouting())
    del networks
    shard_roles(roles, mesh, torch.device("cpu"), files=files if way == "rows" else None)
    peak = most.stop() - before
    gc.collect()
    found = {"rank": dist.get_rank(), "end": private() - before, "peak": peak}
    print(f"\n{RESULT}{json.dumps(found)}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def run(folder: Path, way: str, processes: int) -> list[dict[str, float]]:
    """What each process took. Raises RuntimeError with the end of what failed workers printed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = [str(ROOT / "benchmarks/cost/sharded_loading.py"), "--worker", way, "--folder", str(folder)]
    done = subprocess.run(
        [*launch, *script], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    found = results_of(done.stdout)
    if done.returncode or len(found) != processes:
        raise RuntimeError(f"{len(found)} of {processes} results; {done.stderr[-3000:]}")
    return found


def write_base(folder: Path, layers: int) -> float:
    """Write the base in several files; returns its bytes in bfloat16."""
    pipeline: WanPipeline = random_wan.pipeline(layers, "cpu")
    pipeline.transformer.to(torch.bfloat16)
    pipeline.save_pretrained(folder, max_shard_size="100MB")
    return float(sum(p.numel() * 2 for p in pipeline.transformer.parameters()))


def predicted(folder: Path, processes: int) -> float:
    """Bytes of the teacher on each of so many GPUs, as a dry run counts them."""
    config = parse_config(
        {
            "model": {"path": str(folder), "dtype": "bfloat16"},
            "data": {"prompts": str(ROOT / "training/prompts/video.txt")},
            "plan": {"steps": [2, 2]},
            "parallel": {"sharding": "fsdp"},
        },
        "sharded_loading.py",
    )
    networks = networks_of(pipeline_on_meta(TeacherSource(str(folder))), family("wan"))
    return static_memory(config, config.plan.build(), Roles(networks, family("wan"), {}), processes).parts[0].bytes


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each way and number of processes; MiB."""
    lines = [
        "| processes | each loads | predicted for each | at the end, each | at most, each | at most, all together |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        mib = {key: row[key] / 2**20 for key in ("predicted", "end", "peak", "together")}
        lines.append(
            f"| {row['processes']} | {WAYS[row['way']]} | {mib['predicted']:.0f} | {mib['end']:.0f} | "
            f"{mib['peak']:.0f} | {mib['together']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=COUNT, default=20, help="of the base, 10 are 100 million parameters")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/sharded_loading")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.folder, arguments.worker)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        size = write_base(Path(name), arguments.layers)
        for way in WAYS:
            for processes in PROCESSES:
                found = run(Path(name), way, processes)
                row = {"processes": processes, "way": way, "predicted": predicted(Path(name), processes)}
                row |= {key: max(one[key] for one in found) for key in ("end", "peak")}
                rows.append(row | {"together": sum(one["peak"] for one in found), "each": found})
                print(rows[-1], flush=True)
    about = (
        f"A base of {size / 2**20:.0f} MiB (Wan, {arguments.layers} blocks of width 768, bfloat16) on CPUs; MiB of "
        "private memory, of the process that took most. Written by `python benchmarks/cost/sharded_loading.py`, whose "
        "head says what is measured."
    )
    data = {"base": size, "machine": random_wan.machine("cpu"), "rows": rows}
    write_result(arguments.output, data, f"# Sharded loading\n\n{about}\n\n{table(rows)}\n")
    print(table(rows))


if __name__ == "__main__":
    main()

"""Counts what networks really evaluate in an update, on 1, 2 and 4 processes: ``python counted_evaluations.py``.

Libraries are imported once, the processes are forks of this one. Prints a line of JSON for each case: passes forwards
and backwards over samples in all processes, and the numbers of the update.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from benchmarks.cost.random_training import RandomTraining, small_config, small_teacher
from training.distributed.sharding import mesh_of
from training.loop import compiling

CASES = [(1, 1, "none"), (2, 1, "none"), (2, 1, "regional"), (2, 2, "none"), (4, 1, "none"), (4, 2, "none")]
"""Processes, groups of samples, and whether blocks are compiled, to graphs that run as they are."""
BATCH, UPDATES = 8, 4


compiling.BACKEND = os.environ.get("BACKEND", "eager")


def count(processes: int, groups: int, compiled: str) -> dict[str, object]:
    config = small_config(
        plan={"steps": [1, 1], "shift": 5.0},
        batch_size=BATCH,
        fake_updates=2,
        score_groups=groups,
        compile=compiled,
        memory={"micro_batch_size": 1},
        parallel={"sharding": "fsdp"},
        objective={"guidance_scale": 3.0},
    )
    torch.manual_seed(0)
    mesh = mesh_of(config, torch.device("cpu"), processes)
    teacher, accelerator = small_teacher("wan_two_networks", "tiny", 8), Accelerator(cpu=True)
    training = RandomTraining(config, teacher, accelerator, phase=1, mesh=mesh)
    passes = torch.zeros(2)

    def forwards(
        network: nn.Module, args: object, kwargs: dict[str, torch.Tensor], output: tuple[torch.Tensor]
    ) -> None:
        passes[0] += len(kwargs["hidden_states"])
        if torch.is_grad_enabled():
            passes[1] += len(kwargs["hidden_states"])

    for network in training.roles.networks():
        network.register_forward_hook(forwards, with_kwargs=True)
    values = [training.update().values for _ in range(UPDATES)]
    if processes > 1:
        dist.all_reduce(passes)
    assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == (compiled != "none")
    return {"processes": processes, "groups": groups, "compiled": compiled, "passes": passes.tolist(), "values": values}


def fork(processes: int, groups: int, compiled: str, rendezvous: str) -> None:
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
            if processes > 1:
                dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=processes)
            found = count(processes, groups, compiled)
            if rank == 0:
                print(json.dumps(found), flush=True)
            os._exit(0)
        children.append(child)
    for child in children:
        if os.waitpid(child, 0)[1]:
            sys.exit(f"a process of {processes} failed")


with tempfile.TemporaryDirectory() as folder:
    for case in CASES:
        fork(*case, f"{folder}/{'-'.join(map(str, case))}")

"""Two processes that share a sample, with compiled blocks and without: a program for the tests.

Graphs are captured as ever and run as they are. Prints, as JSON, the relative distance of velocities and gradients, and
how many graphs there were.
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
from torch import Tensor

from benchmarks.cost.random_training import small_teacher
from training.distributed.context_parallel import divide_samples


def evaluate(compiled: bool) -> tuple[Tensor, Tensor]:
    """Velocity of a sample, and the gradient with respect to it."""
    teacher = small_teacher("wan", "tiny", 8)
    (network,) = teacher.networks.values()
    divide_samples([network], 2, torch.device("cpu"))
    for block in teacher.family.blocks_of(network) if compiled else ():
        block.compile(backend="eager")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, *teacher.shape, generator=generator).requires_grad_()
    given = {name: torch.randn(1, *shape, generator=generator) for name, shape in teacher.conditioning.items()}
    velocity = teacher.family.velocity(network, x, torch.tensor([0.7]), given)
    velocity.square().sum().backward()
    assert x.grad is not None
    return velocity.detach(), x.grad


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


with tempfile.TemporaryDirectory() as folder:
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
            plain, compiled = evaluate(False), evaluate(True)
            if rank == 0:
                found = [distance(a, b) for a, b in zip(compiled, plain, strict=True)]
                graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
                print(json.dumps({"distances": found, "graphs": graphs}), flush=True)
            os._exit(0)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit("a process failed")

"""Two processes that share a sample and the weights, with compiled blocks and without: a program for the tests.

Graphs are captured as ever and run as they are, unless ``BACKEND`` names another backend. Prints, as JSON, the relative
distances of velocities and gradients, and how many graphs there were.
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

from benchmarks.cost.random_training import small_config, small_teacher
from training.distributed.sharding import mesh_of
from training.loop import compiling
from training.loop.build import build_roles

CPU = torch.device("cpu")
compiling.BACKEND = os.environ.get("BACKEND", "eager")


def evaluate(compiled: str) -> tuple[Tensor, Tensor]:
    """Velocity of a sample by an expert, and the gradient with respect to its weights."""
    parallel = {"sharding": "fsdp", "context_parallel": 2}
    config = small_config(compile=compiled, parallel=parallel, memory={"gradient_checkpointing": True})
    torch.manual_seed(0)
    teacher = small_teacher("wan", "tiny", 8)
    roles = build_roles(config, teacher.family, teacher.networks, teacher.routing, CPU, mesh_of(config, CPU, 2))
    expert = config.plan.build().phases[0].name
    roles.set_trainable([expert])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, *teacher.shape, generator=generator)
    given = {name: torch.randn(1, *shape, generator=generator) for name, shape in teacher.conditioning.items()}
    velocity = roles.velocity(expert, x, torch.tensor([0.7]), given)
    velocity.square().sum().backward()
    gradients = [parameter.grad.flatten() for parameter in roles.parameters(expert) if parameter.grad is not None]
    return velocity.detach(), torch.cat(gradients)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


with tempfile.TemporaryDirectory() as folder:
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
            plain, compiled = evaluate("none"), evaluate("regional")
            if rank == 0:
                found = [distance(a, b) for a, b in zip(compiled, plain, strict=True)]
                graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
                print(json.dumps({"distances": found, "graphs": graphs}), flush=True)
            os._exit(0)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit("a process failed")

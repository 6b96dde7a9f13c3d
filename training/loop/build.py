"""Building a run: everything that its trainer works with, made in the one order in which it can be made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from pdmd_core.families import ModelFamily, TeacherRouting
from pdmd_core.hashing import digest_of
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import Roles
from training.config.schema import DistillConfig
from training.data.teacher import (
    TeacherSource,
    family_of_pipeline,
    load_image_side,
    load_without_networks,
    networks_of,
    pipeline_on_meta,
)
from training.data.training_data import TrainingData, training_data
from training.data.weight_files import WeightFiles
from training.distributed.context_parallel import check_context_parallel, divide_samples
from training.distributed.processes import of_first_process
from training.distributed.sharding import check_processes, mesh_of, shard_roles
from training.loop.attention import set_attention
from training.loop.compiling import compile_blocks
from training.loop.distilled_teacher import check_base
from training.loop.optimizers import check_libraries
from training.loop.precision import leave_casts_to_autocast, make_accelerator
from training.loop.resumption import Resume, Resumption, find_resumption
from training.loop.rng import RunRNG
from training.loop.start import load_start, specs_of_run, start_of
from training.loop.targets import check_targets
from training.memory.block_swap import swap_blocks
from training.memory.offload import keep_one_network
from training.memory.quantization import library_config, quantize
from training.monitoring.monitor import warn
from training.monitoring.trackers import check_tracker


@dataclass(frozen=True)
class BuiltRun:
    """What a trainer works with.

    Attributes:
        config: The configuration.
        accelerator: Device, precision and processes.
        plan: The phase plan.
        pipeline: The teacher's pipeline without what encodes prompts and images.
        family: The model family of the teacher.
        data: Conditioning, sizes and order of the examples.
        roles: The networks.
        rng: Everything that is random once the weights exist.
        fingerprints: Fingerprints of the teacher's networks by component, taken before they were changed in any way.
        teacher: SHA-256 of all their weights, and of the experts that teach in their place.
        start: By expert, what it is or begins from beside the teacher.
        resumption: Where the run goes on; None for one that begins.
    """

    config: DistillConfig
    accelerator: Accelerator
    plan: PhasePlan
    pipeline: DiffusionPipeline
    family: ModelFamily
    data: TrainingData
    roles: Roles
    rng: RunRNG
    fingerprints: Mapping[str, Mapping[str, str]]
    teacher: str
    start: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    resumption: Resumption | None = None

    @property
    def history(self) -> Sequence[str]:
        """What was changed on request since the run began."""
        return self.resumption.history if self.resumption else ()

    @property
    def evaluates_with_others(self) -> bool:
        """Whether an evaluation of a network takes all processes, because they share its weights or its samples."""
        sharded = self.config.parallel.sharding != "none" and self.accelerator.num_processes > 1
        return sharded or self.config.parallel.context_parallel > 1


def build_run(config: DistillConfig, resume: Resume | None = None) -> BuiltRun:
    """Check a configuration, load its teacher, encode its data and make its networks.

    All processes of a run call this together. What can be known to fail is said before anything is loaded.

    Args:
        config: The configuration of the run.
        resume: How to go on from a checkpoint, where there is one; None begins.

    Returns:
        Everything that ``Trainer`` needs.

    Raises:
        UserError: If the run cannot be: a library, the teacher, the prompts, the number of processes, or a checkpoint
            that is of another run (one line).
    """
    tracker, logs = config.monitoring.tracker, str(config.output_dir / "logs")
    timeout = config.parallel.timeout_minutes
    accelerator = make_accelerator(config.precision, timeout_minutes=timeout, log_with=tracker, project_dir=logs)
    rank, processes = accelerator.process_index, accelerator.num_processes
    check_processes(config, processes)
    check_libraries(config)
    check_tracker(config)
    library_config(config.model.quantization)
    say = warn if accelerator.is_main_process else lambda text: None
    resumption = find_resumption(config, resume, say) if resume else None
    start = start_of(config)
    if resumption:
        resumption.check_start(start.notes, config)
    source = TeacherSource(config.model.path, config.model.revision, config.model.pipeline)
    described = pipeline_on_meta(source)
    family = family_of_pipeline(described)
    check_context_parallel(config, family, described)
    check_targets(config, networks_of(described, family))
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    files = WeightFiles(source, networks_of(described, family), dtype)
    check_base(start.teacher, files.networks, family, say, files.sampler)
    teacher = of_first_process(files.digest)
    if start.teacher:
        teacher = digest_of(teacher, [expert.sha256 for expert in start.teacher.manifest.experts])
    check = None
    if resumption:
        resumption.check_teacher(teacher, config)
        check = partial(resumption.check_prompts, config=config)
    data = training_data(config, source, family, described, accelerator.device, check)
    mesh = mesh_of(config, accelerator.device, processes)
    pipeline = load_image_side(source, dtype) if mesh is None else load_without_networks(source, dtype)
    networks = networks_of(pipeline, family) if mesh is None else files.hollow()
    torch.manual_seed(config.seed)  # the weights of adapters
    routing = family.teacher_routing(described.config)
    roles = build_roles(
        config, family, networks, routing, accelerator.device, mesh, start.notes, say=accelerator.print, files=files
    )
    for line in load_start(start, config, roles, pipeline):
        accelerator.print(line)
    together = config.parallel.context_parallel
    group, groups = rank // together, config.groups(processes)
    rng = RunRNG(config.seed, config.batch_size, data.order, group, groups, accelerator.device)
    plan = config.plan.build()
    return BuiltRun(
        config,
        accelerator,
        plan,
        pipeline,
        family,
        data,
        roles,
        rng,
        files.fingerprints(),
        teacher,
        start.notes,
        resumption,
    )


def build_roles(
    config: DistillConfig,
    family: ModelFamily,
    networks: Mapping[str, nn.Module],
    routing: TeacherRouting,
    device: torch.device,
    mesh: DeviceMesh | None = None,
    start: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    kind: type[Roles] = Roles,
    say: Callable[[str], None] = print,
    files: WeightFiles | None = None,
) -> Roles:
    """Make the roles of a run on a teacher's networks, and put them where they compute.

    The order is the content: weights are quantised before adapters are put beside them; copies are made of what is
    whole; blocks are compiled before they are sharded; only weights that stay whole are offloaded; samples are divided
    last, by hooks around everything before.

    Args:
        config: The configuration of the run.
        family: The model family of the teacher.
        networks: The teacher's networks by component, on the CPU. They are taken over.
        routing: Which of two networks runs where.
        device: Where networks compute.
        mesh: The processes that share the weights; None when every one holds all of them.
        start: Notes of ``start.Start``: experts that are given have their own kind and rank.
        kind: The class of what is made.
        say: Is told what computes attention, where something was asked for.
        files: With a mesh, where the weights of hollow networks are; None for networks that have theirs.

    Returns:
        The roles; everything is frozen.

    Raises:
        UserError: If a library is missing, or a role cannot stand on the networks.
    """
    quantize(networks.values(), family, config.model.quantization)
    one_at_a_time = config.memory.offload_idle_network and len(networks) > 1
    if mesh is None and not one_at_a_time and not config.memory.swap_blocks:
        networks = {name: network.to(device) for name, network in networks.items()}
    roles = kind(networks, family, specs_of_run(config, routing, start), routing, empty_copies=mesh is not None)
    if config.precision == "bf16":
        leave_casts_to_autocast(roles.networks())
    if config.attention != "native":
        dtype = torch.bfloat16 if config.precision == "bf16" else getattr(torch, config.model.dtype)
        set_attention(roles.networks(), config.attention, device, dtype, say)
    if config.compile == "regional":
        compile_blocks(roles.networks(), family)
    if mesh is not None:
        shard_roles(roles, mesh, device, torch.bfloat16 if config.precision == "bf16" else None, files)
    if one_at_a_time:
        keep_one_network(roles, device)
    if config.memory.swap_blocks:
        swap_blocks(roles, config.memory.swap_blocks, device)
    if config.parallel.context_parallel > 1:
        divide_samples(roles.networks(), config.parallel.context_parallel, device)
    if config.memory.gradient_checkpointing:
        for network in roles.networks():
            enable_gradient_checkpointing(network)
    return roles


def enable_gradient_checkpointing(network: Any) -> None:
    """Recompute activations in the backward pass (a method of every diffusers network)."""
    network.enable_gradient_checkpointing()

"""What a run would do, without doing it: weights are described on the meta device."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from pdmd_core.evaluations import evaluations_per_update
from pdmd_core.families import ModelFamily
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import Roles
from training.config.command_line import UserError
from training.config.problems import leaves_of
from training.config.schema import ConfigError, DistillConfig, parse_config, with_values
from training.data.buckets import ANY, Bucket, bucket_of
from training.data.teacher import TeacherSource, family_of_pipeline, networks_of, pipeline_on_meta
from training.data.training_data import buckets_of, latent_shapes
from training.distributed.context_parallel import check_context_parallel
from training.distributed.sharding import check_processes, group_size
from training.loop.distilled_teacher import check_base
from training.loop.start import specs_of_run, start_of
from training.loop.targets import check_targets
from training.memory.activations import activation_bytes, example_shapes
from training.memory.static import Held, in_words, static_memory
from training.monitoring.trackers import check_tracker

_SAVING: tuple[dict[str, Any], ...] = (
    {"memory.micro_batch_size": 1},
    {"memory.gradient_checkpointing": True},
    {"memory.guidance_batched": False},
    {"memory.offload_activations": True},
    {"memory.offload_idle_experts": True},
    {"memory.offload_idle_network": True},
    {"parallel.context_parallel": 2},
    {"parallel.context_parallel": 4},
    {"parallel.context_parallel": 8},
    {"parallel.sharding": "fsdp"},
)
"""What takes less memory and leaves the numbers as they are up to rounding, the cheapest first; at last block swap."""
_PCIE = 25e9
"""Bytes a second from page-locked host memory to a GPU over PCIe 4.0 with 16 lanes, which can carry 31.5e9."""


def describe(config: DistillConfig, memory_per_gpu: float | None = None, gpus: int = 1, advise: bool = True) -> str:
    """Plan, roles, memory of each of ``gpus`` GPUs, evaluations per update, outputs.

    memory_per_gpu: in GiB. advise: look for what would make it fit. Raises UserError when the memory is more,
    ConfigError when the GPUs cannot divide the work.
    """
    check_processes(config, gpus)
    plan, model = config.plan.build(), config.model
    source = TeacherSource(str(model.architecture or model.path), model.revision, model.pipeline)
    pipeline = pipeline_on_meta(source)
    family = family_of_pipeline(pipeline)
    check_context_parallel(config, family, pipeline)
    (shape,) = latent_shapes([Bucket(model.width, model.height, model.frames)], family, pipeline)
    routing, networks = family.teacher_routing(pipeline.config), networks_of(pipeline, family)
    check_targets(config, networks)
    check_tracker(config)
    start = start_of(config)
    check_base(start.teacher, networks, family)
    specs = specs_of_run(config, routing, start.notes)
    with torch.device("meta"):
        roles = Roles(networks, family, specs, routing)
    lines = [plan.describe(), "", f"teacher: {model.path} ({type(pipeline).__name__}, {family.architecture})"]
    if start.teacher is not None:
        lines.append(
            f"  is the base of the experts of {model.experts}, which teach, each at the sigmas of its interval"
        )
    if routing.boundary is not None:
        first, second = routing.components
        lines.append(f"  {first} at sigma >= {routing.boundary:g}, {second} below")
    size = f"{model.width}x{model.height}" + (f", {model.frames} frames" if model.frames > 1 else "")
    lines += [
        f"samples: {size}, latents {'x'.join(map(str, shape))}",
        "",
        f"static memory of {'a GPU' if gpus == 1 else f'each of {gpus} GPUs'}:",
    ]
    held = static_memory(config, plan, roles, gpus)
    lines += [f"  {part.role:12} {in_words(part.bytes)}: {part.how}" for part in held.parts]
    own = config.batch_size // config.groups(gpus)
    activations, how = _activations(config, family, pipeline, shape, own)
    total = held.bytes + activations
    lines += [f"  {'all':12} {in_words(held.bytes)}: weights, gradients, optimizer"]
    all_of_it = "both its networks" if len(networks) > 1 else "the whole of it"
    both = f", {held.bytes / held.all_networks:.3f} of {all_of_it}" if held.all_networks > held.base else ""
    lines += [f"  {'ratio':12} {held.bytes / held.base:7.3f}: all of it against the teacher on the GPU{both}"]
    lines += [f"  {'activations':12} {in_words(activations)}: {how}"]
    lines += [f"  {'peak':12} {in_words(total)}: with them; a GPU's own context and workspaces come on top"]
    stays = "all the time" if held.all_networks > held.base else "until it is on the GPU"
    if held.swapped:
        stays = "what is swapped of it all the time"
    if group_size(config, gpus) > 1:
        stays = "its shard of one weight after the other"
    lines += [f"  {'host memory':12} {in_words(held.loaded)}: the teacher, in each process, {stays}", ""]
    lines += [*_evaluations(config, plan, gpus, held.swapped), *config.remarks(), ""]
    files = ["config.yaml", "metrics.jsonl", "samples/", "checkpoints/", "logs/", "experts/"]
    lines += [
        *_examples(config, family, pipeline),
        f"writes {', '.join(str(Path(config.output_dir) / f) for f in files)}",
    ]
    blocks = max(len(family.blocks_of(network)) for network in roles.bases.values())
    if memory_per_gpu is not None and total > memory_per_gpu * 2**30:
        largest = max([*held.parts, Held("activations", activations, how)], key=lambda part: part.bytes)
        raise UserError(
            f"does not fit: {in_words(total).strip()} for each GPU, {in_words(activations).strip()} of it activations, "
            f"{memory_per_gpu:g} GiB given; the largest is {largest.role} ({in_words(largest.bytes).strip()}); "
            f"{_what_fits(config, memory_per_gpu, gpus, blocks) if advise else ''}"
        )
    return "\n".join(lines)


def _activations(
    config: DistillConfig, family: ModelFamily, pipeline: DiffusionPipeline, latent: Sequence[int], own: int
) -> tuple[float, str]:
    """Bytes of activations, and what they are of."""
    count = min(config.memory.micro_batch_size or own, own)
    try:
        shapes = example_shapes(config, family, pipeline, latent)
        found = activation_bytes(config, family, pipeline.transformer, latent, shapes, own)
    except Exception as error:  # a network of any kind, on tensors without numbers
        return 0.0, f"NOT counted, they come on top ({type(error).__name__}: {' '.join(str(error).split())[:80]})"
    whom = f"{count} sample{'s' if count > 1 else ''} at once, by evaluations on tensors that hold nothing"
    return found, whom


def _passes(config: DistillConfig, counts: Mapping[str, float]) -> float:
    """Passes through blocks of the base for a sample: those with gradient are run again in the backward pass."""
    of_roles = {"fake": config.fake.kind, "generator": config.generator.kind, "fake_score": config.fake.kind}
    of_roles["rollout"] = config.generator.kind
    twice = 2 if config.objective.guidance_scale != 1 and not config.memory.guidance_batched else 1
    times = {"fake": 2, "generator": 2, "teacher": twice}
    return sum(value * times.get(name, 1) for name, value in counts.items() if of_roles.get(name, "lora") == "lora")


def _what_fits(config: DistillConfig, memory_per_gpu: float, gpus: int, blocks: int) -> str:
    """Which keys would make a run fit: each is added to those before it, where it helps."""
    swap = {"memory.swap_blocks": blocks, "memory.offload_idle_network": False, "parallel.sharding": "none"}
    own, chosen = leaves_of(config.model_dump()), dict[str, Any]()
    for changes in (*_SAVING, swap):
        together = chosen | changes
        if all(own.get(key) == value for key, value in changes.items()):
            continue
        try:
            changed = parse_config(with_values(json.loads(config.model_dump_json()), together), "config")
            describe(changed, memory_per_gpu, gpus, advise=False)
        except ConfigError:  # they do not go together
            continue
        except UserError:
            chosen = together
            continue
        said = {key: value for key, value in together.items() if own.get(key) != value}
        return "it fits with " + ", ".join(f"{key}: {str(value).lower()}" for key, value in said.items())
    return (
        "use more GPUs with parallel.sharding: fsdp (--gpus), parallel.context_parallel for samples that are too "
        "large, kind: lora, a lower rank, or a smaller sample"
    )


def _examples(config: DistillConfig, family: ModelFamily, pipeline: DiffusionPipeline) -> list[str]:
    """How many examples there are, and of which sizes where there are several. Raises PromptError, ConfigError."""
    buckets = buckets_of(config)
    shapes = latent_shapes(buckets, family, pipeline)
    counts = Counter(bucket_of(example, buckets) for example in config.data)
    lines = [f"{counts.total()} prompts from {config.data.prompts}"]
    if len(buckets) > 1:
        lines += [
            f"  {bucket}, latents {'x'.join(map(str, shape))}: {counts[i] + counts[ANY]} of them"
            for i, (bucket, shape) in enumerate(zip(buckets, shapes, strict=True))
        ]
    return lines


def _evaluations(config: DistillConfig, plan: PhasePlan, gpus: int, swapped: float) -> list[str]:
    own, together = config.batch_size // config.groups(gpus), config.parallel.context_parallel
    at_once = min(config.memory.micro_batch_size or own, own)
    whom = "GPU" if together == 1 else f"group of {together} GPUs, which share its tokens"
    lines = [f"an update has {config.batch_size} samples, {own} for each {whom}, {at_once} at once"]
    guidance = ""
    if config.objective.guidance_scale != 1:
        batched = config.memory.guidance_batched
        guidance = "; the teacher's is of twice the batch" if batched else "; the teacher's counts twice"
    for k, phase in enumerate(plan.phases):
        if k < config.first_phase:
            lines.append(f"phase {phase.name}: its expert is that of {config.start.experts}, frozen")
            continue
        counts = evaluations_per_update(
            plan, k, config.objective, config.fake_updates, config.draws_per_rollout, bool(config.rollouts.bank)
        )
        parts = ", ".join(f"{name} {value:g}" for name, value in counts.items() if value)
        lines.append(
            f"phase {phase.name}: {config.updates_of(k)} updates, {sum(counts.values()):g} network evaluations of each "
            f"sample ({parts}{guidance if counts['teacher'] else ''})"
        )
        if bank := config.rollouts.bank:
            if config.objective.expert_loss == "denoising":
                steps = len(plan.sigmas) * config.objective.path_steps
                made = f"{bank} samples of the teacher, {steps} evaluations each, for all phases{guidance}"
                lines += [f"  rollouts.bank: {made}"] if k == config.first_phase else []
            elif k:
                steps = sum(len(earlier.sigmas) for earlier in plan.phases[:k])
                lines.append(f"  rollouts.bank: {bank} samples of {steps} evaluations each before its first update")
        if swapped:
            passes = _passes(config, counts) * -(-own // at_once)
            lines.append(
                f"  block swap: {passes:g} passes copy {in_words(swapped).strip()} each, at {_PCIE / 1e9:g} GB/s "
                f"{passes * swapped / _PCIE:.1f} s in an update, of which computing hides as much as it takes longer"
            )
    return lines

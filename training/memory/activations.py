"""The memory that activations take: training evaluations of the real code on fake tensors, which hold nothing."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from pdmd_core.batch import PROMPT_MASK, Batch, Renoising
from pdmd_core.distillation import PhasedDistiller
from pdmd_core.families import ModelFamily, TeacherRouting
from pdmd_core.method import fake_roles
from pdmd_core.objectives import RenoisedSamples
from pdmd_core.roles import FAKE, Roles
from training.config.schema import DistillConfig
from training.loop.build import enable_gradient_checkpointing
from training.loop.precision import leave_casts_to_autocast

_LAYERS = ("num_layers", "n_layers")
"""How networks call the number of their blocks."""
_FEW = (2, 3)
"""Blocks that are built: with more of them the memory grows by the same amount for each."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were made while it is entered and are still there.

    Attributes:
        now: Of those that are there.
        peak: The most that they were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        before = [tensor.untyped_storage() for tensor in _tensors([args, kwargs or {}])]
        for tensor in _tensors(found):
            storage = tensor.untyped_storage()
            if storage not in self._known and not any(storage is other for other in before):
                self._known[storage] = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return found

    def _gone(self, size: int) -> None:
        self.now -= size


def _tensors(value: object) -> Iterator[Tensor]:
    """Those in nested arguments or results of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


Shapes = Mapping[str, tuple[int, ...]]
"""Of one example's conditioning, by name."""


def example_shapes(config: DistillConfig, family: ModelFamily, pipeline: Any, latent: Sequence[int]) -> Shapes:
    """The shapes of an example's conditioning, with its image where the pipeline is given one.

    Args:
        config: The configuration of the run; its first example tells where images can be left out.
        family: The model family of the teacher.
        pipeline: The teacher's pipeline, whose weights may be on the meta device.
        latent: Shape of a latent.
    """
    given = family.takes_image(pipeline) and (family.needs_image(pipeline) or next(iter(config.data)).image is not None)
    tokens = config.model.max_sequence_length + (family.image_tokens(pipeline, latent) if given else 0)
    shapes = family.conditioning_shapes(pipeline.transformer.config, tokens, latent)
    return shapes | (family.image_shapes(pipeline, latent) if given else {})


def activation_bytes(
    config: DistillConfig, family: ModelFamily, network: Any, latent: Sequence[int], shapes: Shapes, own: int
) -> float:
    """The most that activations take in a step of the fake and in one of the generator, on one device.

    Args:
        config: The configuration of the run.
        family: The model family of the teacher.
        network: A network of the teacher, on any device; its configuration is what counts.
        latent: Shape of a latent.
        shapes: Those of ``example_shapes``.
        own: Samples of a process in an update.

    Returns:
        Bytes, beside weights, gradients and optimizers.
    """
    count = min(config.memory.micro_batch_size or own, own)
    key = next((key for key in _LAYERS if key in network.config), None)
    if key is None or network.config[key] <= _FEW[1]:
        return _peak(config, family, network, {}, latent, shapes, count) / config.parallel.context_parallel
    few, more = (_peak(config, family, network, {key: blocks}, latent, shapes, count) for blocks in _FEW)
    whole = more + (more - few) / (_FEW[1] - _FEW[0]) * (network.config[key] - _FEW[1])
    return whole / config.parallel.context_parallel


def _peak(
    config: DistillConfig,
    family: ModelFamily,
    like: Any,
    changes: Mapping[str, int],
    latent: Sequence[int],
    shapes: Shapes,
    count: int,
) -> int:
    """Of ``count`` samples on a network like this one with some settings changed."""
    plan = config.plan.build()
    index = max(range(len(plan)), key=lambda k: len(plan.phases[k].sigmas))  # where the most steps may be recorded
    phase = plan.phases[index]
    expert = phase.name
    with init_empty_weights(include_buffers=False):
        network = type(like).from_config({**like.config, **changes})
    sections = {expert: config.generator, **dict.fromkeys(fake_roles(plan, config.objective), config.fake)}
    specs = {role: replace(section, components=None) for role, section in sections.items()}
    with torch.device("meta"):
        roles = Roles(network, family, specs, TeacherRouting(), empty_copies=True)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        _fill(config, roles)
    roles.set_trainable(specs)
    if config.precision == "bf16":
        leave_casts_to_autocast(roles.networks())
    if config.memory.gradient_checkpointing:
        for each in roles.networks():
            enable_gradient_checkpointing(each)
    wide = getattr(torch, config.model.dtype)
    with fake:
        noise = torch.empty(count, *latent)
        conditioning = {name: torch.empty(count, *shape, dtype=wide) for name, shape in shapes.items()}
    if PROMPT_MASK in shapes:
        conditioning[PROMPT_MASK] = torch.ones(count, *shapes[PROMPT_MASK])
    distiller = PhasedDistiller(plan, index, roles, config.objective, config.memory.guidance_batched)
    batch = Batch(noise, conditioning, conditioning, begun=True)
    renoising = Renoising(distiller.draw_score_sigma(count, torch.Generator().manual_seed(0)), noise)
    renoisings = [renoising] * config.objective.score_draws
    alone = not distiller.fakes or config.fake.kind == config.generator.kind  # a step of the expert asks all roles
    step = 0 if config.objective.expert_rollouts == "through" else len(phase.sigmas) - 1
    peak = 0
    for role in [expert] if alone else [FAKE, expert]:
        for parameter in roles.parameters(role):
            with fake:
                parameter.grad = torch.empty_like(parameter)
        kept = saved_tensors_hooks(_away, _back) if config.memory.offload_activations else nullcontext()
        with LiveBytes() as live, attention_backend("native"):  # what this process asked of other networks is no matter
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16", cache_enabled=False), kept:
                if role == FAKE:
                    loss = distiller.fake_loss(noise, conditioning, renoising)
                elif distiller.regresses:
                    loss = distiller.path_loss(batch, step)
                elif distiller.denoises:
                    with torch.no_grad():  # as any step of the teacher's sampling
                        distiller.teacher_velocity(RenoisedSamples(noise, noise, 0.0, renoising.t), batch)
                    loss = distiller.denoising_loss(batch, renoising)
                else:
                    loss = distiller.generator_loss(distiller.expert_rollout(batch, step), batch, *renoisings).loss
            roles.activate(role)
            loss.backward()
        peak = max(peak, live.peak)
    return peak


def _fill(config: DistillConfig, roles: Roles) -> None:
    """Give described weights their dtypes, inside a fake mode."""
    adapters = {p for role in roles.specs if not roles.owns_copies(role) for p in roles.parameters(role)}
    bases = [id(network) for network in roles.bases.values()]
    for network in roles.networks():
        kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
        sent = config.parallel.sharding != "none" and config.precision == "bf16"
        narrow = (
            getattr(torch, config.model.dtype) if id(network) in bases else torch.bfloat16 if sent else torch.float32
        )
        for path, module in network.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                whole = parameter in adapters or (id(network) in bases and kept & {*path.split("."), name})
                value = torch.empty(parameter.shape, dtype=torch.float32 if whole else narrow)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    roles.forget_parameters()


def _away(tensor: Tensor) -> tuple[torch.Size, torch.dtype, FakeTensorMode | None]:
    """What stays on the device of a tensor that is kept elsewhere: nothing."""
    return tensor.shape, tensor.dtype, getattr(tensor, "fake_mode", None)


def _back(kept: tuple[torch.Size, torch.dtype, FakeTensorMode | None]) -> Tensor:
    shape, dtype, mode = kept
    with mode or nullcontext():
        return torch.empty(shape, dtype=dtype)

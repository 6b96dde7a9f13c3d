"""The teacher's own samples of the prompts and noise of validations: many guided steps, made once and kept on disk."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pdmd_core.experts.errors import ExpertsError
from pdmd_core.experts.format.mapped import MappedFile
from pdmd_core.flow import euler_step, velocity_to_x0
from pdmd_core.hashing import digest_of
from pdmd_core.phases import PhasePlan
from pdmd_core.velocities import guided_velocity
from training.config.command_line import UserError
from training.data.prompt_cache import PromptCache, digest_of_tensors
from training.distributed.processes import of_first_process
from training.loop.build import BuiltRun
from training.loop.validation import starting_points


class SharedEvaluationFailed(UserError):
    """An evaluation that all processes share failed in this one: the others cannot go on without it. One line."""


def teacher_samples(run: BuiltRun, prompts: PromptCache) -> dict[str, Tensor]:
    """Sample the teacher, or find what an earlier run with the same teacher, prompts and noise left in the cache.

    All processes call this together and share the work.

    Args:
        run: The run.
        prompts: What is sampled.

    Returns:
        Latents by phase, on the CPU: what the teacher's samples look like from the end of that phase, whence they jump
        to sigma 0 as the experts' do in a validation; for the last phase these are the samples themselves.
    """
    path = (run.config.data.cache_dir or run.config.output_dir / "cache") / f"{_identity(run, prompts)}.safetensors"
    if found := of_first_process(lambda: _read(path)):
        return found
    latents = _sample(run, prompts)
    if run.accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{secrets.token_hex(4)}.part")
        save_file(latents, part, {"sha256": digest_of_tensors(path, latents, {})})
        part.replace(path)
    return latents


def _identity(run: BuiltRun, prompts: PromptCache) -> str:
    """Everything that the samples depend on, by content."""
    config, data = run.config, run.data
    return (
        "teacher-"
        + digest_of(
            1,
            [run.teacher, prompts.identity, list(data.validation_shape), config.validation.seeds, config.seed],
            [config.validation.teacher_steps, config.plan.shift, run.plan.to_dict(), config.objective.guidance_scale],
            [config.model.dtype, config.model.quantization, config.precision],
        )[:24]
    )


def _read(path: Path) -> dict[str, Tensor] | None:
    """The samples of a file; None where there is none, or it is damaged, which is said."""
    if not path.is_file():
        return None
    try:
        file = MappedFile(path)
        tensors = {name: file.tensor(name).clone() for name in file.header.specs}
        if file.header.metadata.get("sha256") == digest_of_tensors(path, tensors, {}):
            return tensors
        problem = "not what was written"
    except (OSError, ExpertsError) as error:
        problem = " ".join(str(error).split())[:100]
    print(f"warning: {path} is damaged ({problem}): the teacher samples again", file=sys.stderr)
    return None


@torch.no_grad()
def _sample(run: BuiltRun, prompts: PromptCache) -> dict[str, Tensor]:
    """Every group of processes samples its share, as many as each other one: networks may be in shards."""
    config, accelerator = run.config, run.accelerator
    indices, noise = starting_points(run, prompts)
    together, count = config.parallel.context_parallel, len(indices)
    groups = accelerator.num_processes // together
    share = -(-count // groups)
    rows = torch.arange(groups * share).clamp(max=count - 1)[accelerator.process_index // together * share :][:share]
    at_once = config.memory.micro_batch_size or share
    error, own = "", {phase.name: torch.zeros(share, *noise.shape[1:]) for phase in run.plan.phases}
    try:
        parts = [_walk(run, prompts, indices[part], noise[part]) for part in rows.split(at_once)]
        own = {name: torch.cat([part[name] for part in parts]).cpu() for name in own}
    except Exception as failure:
        error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
        if run.evaluates_with_others:
            raise SharedEvaluationFailed(f"the teacher's samples for validations failed: {error}") from failure
    failed = accelerator.reduce(torch.tensor(float(bool(error)), device=accelerator.device), "sum")
    if failed:
        raise UserError(
            f"the teacher's samples for validations failed{': ' if error else ' in another process'}{error}"
        )
    found = {}
    for name, value in own.items():
        whole = accelerator.gather(value.to(accelerator.device)).cpu().unflatten(0, (-1, share))
        found[name] = whole[::together].flatten(0, 1)[:count].float().contiguous()
    return found


def _walk(run: BuiltRun, prompts: PromptCache, indices: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Euler steps of the guided teacher; at each boundary of the plan, also the jump from there to sigma 0.

    Experts that teach walk the sigmas of their own plan; beyond those they are asked for a jump only.
    """
    config, plan, device = run.config, run.plan, run.accelerator.device
    conditioning, negative = prompts.conditioning_pair(indices, device)
    steps = PhasePlan.from_steps([config.validation.teacher_steps or 1], config.plan.shift).sigmas
    if own := run.roles.teacher_plan:
        steps = own.sigmas
    sigmas = sorted({*steps, *plan.boundaries}, reverse=True)
    boundaries = dict(zip(plan.boundaries, plan.phases, strict=False))
    x, found = noise.to(device), {}
    walked = x  # the velocity of the last step
    with run.accelerator.autocast():
        for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
            scale, batched = config.objective.guidance_scale, config.memory.guidance_batched
            velocity = guided_velocity(run.roles, x, sigma, conditioning, negative, scale, batched)
            if sigma in boundaries:
                found[boundaries[sigma].name] = velocity_to_x0(x, velocity, sigma)
            walked = velocity if own is None or sigma in steps else walked
            x = euler_step(x, walked, sigma, following)
    return found | {plan.phases[-1].name: x}

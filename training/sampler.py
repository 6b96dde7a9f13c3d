"""Sampling a teacher and its phase experts from the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pdmd_core.distillation import expert_velocities, guided_velocity
from pdmd_core.experts import PhasedExperts
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import Roles
from pdmd_core.rollout import Velocity, route, sample
from training.command_line import UserError
from training.export import roles_from_experts
from training.prompts import Example, PromptBank, SampleSize, encode_examples
from training.teacher import TeacherSource, family_of_pipeline, load_image_side, move, networks_of

__all__ = ["SampleSize", "Sampler"]


class Sampler:
    """A teacher, with experts on it when an experts folder is given. The seed alone decides a sample's noise.

    prompts: with an image each (``Example``) for teachers that take one. pipeline: diffusers class, if not the one that
    the teacher's folder names.
    """

    def __init__(
        self,
        teacher: str,
        size: SampleSize,
        prompts: Sequence[str | Example],
        cache_dir: Path,
        experts: PhasedExperts | None = None,
        batch: int = 64,
        device: str | None = None,
        pipeline: str | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        source = TeacherSource(teacher, pipeline=pipeline)
        self.pipeline = move(load_image_side(source, torch.float32), self.device)
        self.family = family_of_pipeline(self.pipeline)
        try:
            self.shape = self.family.latent_shape(self.pipeline, size.height, size.width, size.frames)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.batch = batch
        self.plan = experts.manifest.plan if experts else None
        networks = networks_of(self.pipeline, self.family)
        routing = self.family.teacher_routing(self.pipeline.config)
        if experts:
            self.roles = roles_from_experts(experts, networks, self.family, routing)
        else:
            self.roles = Roles(networks, self.family, {}, routing)
        examples = [prompt if isinstance(prompt, Example) else Example(prompt) for prompt in prompts]
        self.bank: PromptBank = encode_examples(examples, "", source, self.family, size, cache_dir, self.device)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Starting noise (seeds, ...): the same as a diffusers pipeline draws from a CPU generator with that seed."""
        drawn = [torch.randn(1, *self.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.cat(drawn).to(self.device)

    def with_experts(self, pairs: Sequence[tuple[int, int]], progress: str | None = "experts") -> Tensor:
        """Latents of (prompt index, seed) pairs through the experts, as their plan says, without guidance."""
        plan = self.plan
        if plan is None:
            raise ValueError("this sampler was made without experts")

        def velocity(indices: Tensor, conditioning: dict[str, Tensor]) -> Velocity:
            return route(expert_velocities(self.roles, plan, conditioning), plan)

        return self._sample(pairs, plan.sigmas, velocity, progress)

    def with_teacher(
        self,
        pairs: Sequence[tuple[int, int]],
        steps: int,
        shift: float,
        guidance_scale: float,
        progress: str | None = "teacher",
    ) -> Tensor:
        """Latents of (prompt index, seed) pairs through the teacher: Euler, uniform in raw time under the shift."""
        sigmas = PhasePlan.from_steps([steps], shift).sigmas

        def velocity(indices: Tensor, conditioning: dict[str, Tensor]) -> Velocity:
            negative = self.bank.negative_conditioning(indices, self.device)
            return lambda x, sigma: guided_velocity(self.roles, x, sigma, conditioning, negative, guidance_scale)

        return self._sample(pairs, sigmas, velocity, progress)

    def _sample(
        self,
        pairs: Sequence[tuple[int, int]],
        sigmas: Sequence[float],
        velocity: Callable[[Tensor, dict[str, Tensor]], Velocity],
        progress: str | None,
    ) -> Tensor:
        parts = [pairs[i : i + self.batch] for i in range(0, len(pairs), self.batch)]
        latents = []
        with tqdm(total=len(parts) * len(sigmas), desc=progress, disable=progress is None, leave=False) as bar:
            for part in parts:
                indices = torch.tensor([prompt for prompt, _ in part])
                conditioning = self.bank.conditioning(indices, self.device)
                noise = self.noise([seed for _, seed in part])
                latents.append(sample(velocity(indices, conditioning), sigmas, noise, lambda step, of: bar.update()))
        return torch.cat(latents)

    def decode(self, latents: Tensor, progress: str | None = "decode") -> Tensor:
        """Latents to pixels in [0, 1] on the CPU, shape (count, frames, 3, height, width)."""
        parts = tqdm(latents.split(32), desc=progress, disable=progress is None, leave=False)
        return torch.cat([self.family.decode(self.pipeline, part).cpu() for part in parts])

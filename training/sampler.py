"""Sampling a teacher and its phase experts from the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from training.prompts import PromptBank, encode_prompts
from training.teacher import family_of_pipeline, load_image_side, move


@dataclass(frozen=True)
class SampleSize:
    """Pixels, frames and the length to which prompts are padded."""

    height: int
    width: int
    frames: int
    max_sequence_length: int


class Sampler:
    """A teacher, with experts on it when an experts folder is given. The seed alone decides a sample's noise."""

    def __init__(
        self,
        teacher: str,
        size: SampleSize,
        prompts: Sequence[str],
        cache_dir: Path,
        experts: PhasedExperts | None = None,
        batch: int = 64,
        device: str | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.pipeline = move(load_image_side(teacher, None, torch.float32), self.device)
        self.family = family_of_pipeline(self.pipeline)
        try:
            self.shape = self.family.latent_shape(self.pipeline, size.height, size.width, size.frames)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.batch = batch
        self.plan = experts.manifest.plan if experts else None
        if experts:
            self.roles = roles_from_experts(experts, self.pipeline.transformer, self.family)
        else:
            self.roles = Roles(self.pipeline.transformer, self.family, {})
        self.bank: PromptBank = encode_prompts(
            prompts, "", teacher, None, self.family, size.max_sequence_length, cache_dir, self.device
        )

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Starting noise (seeds, ...): the same as a diffusers pipeline draws from a CPU generator with that seed."""
        drawn = [torch.randn(1, *self.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.cat(drawn).to(self.device)

    def with_experts(self, pairs: Sequence[tuple[int, int]], progress: str | None = "experts") -> Tensor:
        """Latents of (prompt index, seed) pairs through the experts, as their plan says, without guidance."""
        plan = self.plan
        if plan is None:
            raise ValueError("this sampler was made without experts")

        def velocity(conditioning: dict[str, Tensor]) -> Velocity:
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

        def velocity(conditioning: dict[str, Tensor]) -> Velocity:
            batch = len(next(iter(conditioning.values())))
            negative = self.bank.negative_conditioning(batch, self.device)
            return lambda x, sigma: guided_velocity(self.roles, x, sigma, conditioning, negative, guidance_scale)

        return self._sample(pairs, sigmas, velocity, progress)

    def _sample(
        self,
        pairs: Sequence[tuple[int, int]],
        sigmas: Sequence[float],
        velocity: Callable[[dict[str, Tensor]], Velocity],
        progress: str | None,
    ) -> Tensor:
        parts = [pairs[i : i + self.batch] for i in range(0, len(pairs), self.batch)]
        latents = []
        with tqdm(total=len(parts) * len(sigmas), desc=progress, disable=progress is None, leave=False) as bar:
            for part in parts:
                conditioning = self.bank.conditioning(torch.tensor([prompt for prompt, _ in part]), self.device)
                noise = self.noise([seed for _, seed in part])
                latents.append(sample(velocity(conditioning), sigmas, noise, lambda step, of: bar.update()))
        return torch.cat(latents)

    def decode(self, latents: Tensor, progress: str | None = "decode") -> Tensor:
        """Latents to pixels in [0, 1] on the CPU, shape (count, frames, 3, height, width)."""
        parts = tqdm(latents.split(32), desc=progress, disable=progress is None, leave=False)
        return torch.cat([self.family.decode(self.pipeline, part).cpu() for part in parts])

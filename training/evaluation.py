"""Measuring samples against the teacher's many-step samples, method by method."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pdmd_core.experts import PhasedExperts
from pdmd_core.metrics import frechet_distance, pairwise_distance
from training.command_line import UserError
from training.embedded.features import load_features, see
from training.sampler import Sampler, SampleSize

REFERENCE_SEED = 1_000_000
"""Seeds of the reference start here, those of the methods at 0."""


@dataclass(frozen=True)
class Row:
    """One method in a report."""

    method: str
    network_evaluations: int
    """For one sample, guidance counted as two."""
    frechet: float
    """FD-Emoji to the reference samples (see features.py)."""
    diversity: float
    """Mean distance of layout features between seeds of one prompt."""
    agreement: float
    """Share of samples whose emoji and background the classifier names as the prompt does."""
    seconds: float
    """Time of the network evaluations for all samples, on this machine."""


class Evaluation:
    """Prompts, seeds and the reference samples of one teacher, and the experts measured against them."""

    def __init__(
        self,
        experts: PhasedExperts,
        prompts: Sequence[str],
        seeds: int,
        cache_dir: Path,
        teacher: str | None = None,
        teacher_steps: int = 40,
        shift: float | None = None,
        guidance_scale: float | None = None,
    ) -> None:
        if seeds < 2:
            raise UserError(f"diversity needs at least 2 seeds for each prompt, found {seeds}")
        training = experts.manifest.training
        width, height, frames = training.get("size", (64, 64, 1))
        size = SampleSize(height, width, frames, training.get("max_sequence_length", 512))
        self.plan = experts.manifest.plan
        self.prompts, self.seeds = list(prompts), seeds
        self.teacher_steps = teacher_steps
        self.shift = shift or self.plan.shift or 3.0
        self.guidance_scale = guidance_scale or float(training.get("teacher_guidance_scale", 4.0))
        self.cache_dir = cache_dir
        self.sampler = Sampler(teacher or experts.manifest.base.model, size, prompts, cache_dir, experts)
        self.network, emoji, backgrounds = load_features()
        self.groups = torch.arange(len(self.prompts)).repeat_interleave(seeds)
        self.wanted = wanted_classes(self.prompts, emoji, backgrounds)
        self._reference: Tensor | None = None

    def pairs(self, first_seed: int = 0) -> list[tuple[int, int]]:
        """(prompt index, seed) of every sample, prompt by prompt."""
        return [(p, first_seed + s) for p in range(len(self.prompts)) for s in range(self.seeds)]

    def teacher(self, steps: int, first_seed: int = 0) -> Tensor:
        """The teacher's latents in this many steps with guidance."""
        name = f"teacher, {steps} steps"
        return self.sampler.with_teacher(self.pairs(first_seed), steps, self.shift, self.guidance_scale, name)

    def reference(self) -> Tensor:
        """Style features of the reference samples; computed once and kept in the cache folder."""
        if self._reference is None:
            path = self.cache_dir / f"reference-{self._identity()}.safetensors"
            if not path.exists():
                pixels = self.sampler.decode(self.teacher(self.teacher_steps, REFERENCE_SEED))
                save_file({"style": see(self.network, pixels).style.contiguous()}, path)
            self._reference = load_file(path)["style"]
        return self._reference

    def _identity(self) -> str:
        digest = hashlib.sha256()
        for network in (self.sampler.roles.base_state_dict(), self.network.state_dict()):
            for name, value in sorted(network.items()):
                digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
        settings = [self.prompts, self.seeds, self.teacher_steps, self.shift, self.guidance_scale, self.sampler.shape]
        digest.update(json.dumps(settings).encode())
        return digest.hexdigest()[:24]

    def measure(self, method: str, network_evaluations: int, make: Callable[[], Tensor]) -> tuple[Row, Tensor]:
        """Time ``make`` (latents of ``pairs()``), decode, compare with the reference; the row and the pixels."""
        reference = self.reference()
        start = time.perf_counter()
        latents = make()
        seconds = time.perf_counter() - start
        pixels = self.sampler.decode(latents)
        seen = see(self.network, pixels)
        agrees = (seen.emoji == self.wanted[0][self.groups]) & (seen.background == self.wanted[1][self.groups])
        row = Row(
            method=method,
            network_evaluations=network_evaluations,
            frechet=float(f"{frechet_distance(seen.style, reference):.5g}"),
            diversity=round(pairwise_distance(seen.layout, self.groups), 4),
            agreement=round(float(agrees.float().mean()), 4),
            seconds=round(seconds, 2),
        )
        return row, pixels

    def measure_teacher(self, steps: int) -> tuple[Row, Tensor]:
        """The teacher in this many steps, with guidance unless the scale is 1."""
        guided = self.guidance_scale != 1
        name = f"teacher, {steps} steps" + (" with guidance" if guided else "")
        return self.measure(name, steps * (2 if guided else 1), lambda: self.teacher(steps))

    def measure_experts(self) -> tuple[Row, Tensor]:
        """The experts as their plan says, without guidance."""
        steps = len(self.plan.sigmas)
        return self.measure(f"phase experts, {steps} steps", steps, lambda: self.sampler.with_experts(self.pairs()))


def wanted_classes(prompts: Sequence[str], emoji: Sequence[str], backgrounds: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Indices of the emoji and of the background that each prompt names; -1 where it names none."""

    def find(text: str, names: Sequence[str]) -> int:
        return next((i for i, name in enumerate(names) if name in text), -1)

    parts = [prompt.rpartition(" on a ") for prompt in prompts]
    return (
        torch.tensor([find(subject, emoji) for subject, _, _ in parts]),
        torch.tensor([find(place, backgrounds) for _, _, place in parts]),
    )

"""Sampling a teacher and its phase experts from the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pdmd_core.experts import PhasedExperts
from pdmd_core.families import ModelFamily, family_of
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import Roles
from pdmd_core.rollout import Velocity, route, sample
from pdmd_core.velocities import expert_velocities, guided_velocity
from training.config.command_line import UserError
from training.data.buckets import SampleSize
from training.data.examples import Example
from training.data.prompt_cache import PromptCache, encode_examples
from training.data.teacher import (
    TeacherError,
    TeacherSource,
    family_of_pipeline,
    load_image_side,
    load_without_networks,
    move,
    networks_of,
    pipeline_on_meta,
    text_dtype,
)
from training.loop.export import roles_from_experts
from training.memory.block_swap import swap_blocks
from training.memory.decoding import Decoding, decoded
from training.memory.offload import keep_one_network
from training.memory.quantization import Quantization, quantize
from training.monitoring.bars import progress_bar

Offload = Literal["none", "network", "blocks"]
_LATENTS_AT_ONCE = 2**18
"""Numbers in the latents of a batch: 64 pictures of 64x64 pixels, one clip of 480p."""
_PIXELS_AT_ONCE = 2**22
"""Numbers in the pixels that are decoded at once."""


def default_device(device: str | None = None) -> torch.device:
    """Find the device of a name.

    Args:
        device: As torch names it; a GPU where there is one when None.

    Raises:
        UserError: When torch cannot use it here.
    """
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"--device: expected one that torch can use here, found {device!r}: {reason}") from None
    return found


class Sampler:
    """A teacher, with experts on it when an experts folder is given. The seed alone decides a sample's noise.

    Args:
        teacher: Folder or Hub id of its diffusers pipeline.
        size: Of the samples.
        prompts: The prompts, with an image each (``Example``) for teachers that take one.
        cache_dir: Where encoded prompts are kept.
        experts: The experts that ``with_experts`` samples with.
        batch: Samples at once; as many as are moderate for their size when None.
        device: As torch names it; a GPU where there is one when None.
        pipeline: Diffusers class, if not the one that the teacher's folder names.
        dtype: Of the networks. The autoencoder and everything between network calls stay in float32.
        negative_prompt: What the teacher's guidance moves away from.
        revision: Of a teacher on the Hub.
        quantization: How the base of LoRA experts is kept.
        offload: What waits in host memory: of a teacher of two networks the one that does not run, or all blocks but
            two, which takes the time of copying them in every evaluation.
        decoding: How latents are decoded (``training.memory.decoding``).

    Raises:
        UserError: When the teacher has no such samples, or experts need guidance.
        TeacherError: When there is no such teacher.
        PromptError: When prompts lack images, or have some that the teacher does not take.
        ExpertsError: When experts do not fit the teacher.
    """

    def __init__(
        self,
        teacher: str,
        size: SampleSize,
        prompts: Sequence[str | Example],
        cache_dir: Path,
        experts: PhasedExperts | None = None,
        batch: int | None = None,
        device: str | None = None,
        pipeline: str | None = None,
        dtype: torch.dtype = torch.float32,
        negative_prompt: str = "",
        revision: str | None = None,
        quantization: Quantization = "none",
        offload: Offload = "none",
        decoding: Decoding = "auto",
    ) -> None:
        if batch is not None and batch < 1:
            raise UserError(f"expected at least 1 sample at once, found {batch}")
        if experts and (guidance := experts.manifest.guidance_scale) > 1:
            raise UserError(
                f"{experts.folder}: these experts sample with guidance {guidance:g}, here experts sample without: use "
                "load_phased_pipeline, or the ComfyUI nodes"
            )
        self.device = default_device(device)
        source = TeacherSource(teacher, revision, pipeline)
        precision: Any = {"default": dtype, "vae": torch.float32}  # by component, as diffusers takes it
        described = pipeline_on_meta(source)
        self.family = family_of_pipeline(described)
        self.size = size
        try:
            self.shape = self.family.latent_shape(described, size.height, size.width, size.frames)
        except ValueError as error:
            raise UserError(str(error)) from None
        numbers = torch.Size(self.shape).numel()
        self.batch = max(1, min(64, _LATENTS_AT_ONCE // numbers)) if batch is None else batch
        examples = [prompt if isinstance(prompt, Example) else Example(prompt) for prompt in prompts]
        # before the networks: the encoders are gone when these come
        self.prompts: PromptCache = encode_examples(
            examples, negative_prompt, source, self.family, size, cache_dir, self.device, text_dtype(dtype)
        )
        self.pipeline = load_image_side(source, precision)
        self.decoding = decoding
        networks = networks_of(self.pipeline, self.family)
        routing = self.family.teacher_routing(self.pipeline.config)
        if offload == "network" and len(networks) == 1:
            raise UserError("--offload network is for teachers of two networks, this one has one: use blocks, or none")
        if offload == "none":
            move(self.pipeline, self.device)
        self.plan = experts.manifest.plan if experts else None
        quantize(networks.values(), self.family, quantization)
        if experts:
            self.roles = roles_from_experts(experts, networks, self.family, routing)
        else:
            self.roles = Roles(networks, self.family, {}, routing)
        if offload == "network":
            keep_one_network(self.roles, self.device)
        elif offload == "blocks":
            swap_blocks(self.roles, max(len(self.family.blocks_of(each)) for each in networks.values()), self.device)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Draw the noise that samples start from: the same as a diffusers pipeline draws from a CPU generator.

        Args:
            seeds: The seed of each sample.

        Returns:
            Noise of shape (seeds, ...).
        """
        drawn = [torch.randn(1, *self.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.cat(drawn).to(self.device)

    def with_experts(
        self,
        pairs: Sequence[tuple[int, int]],
        progress: str | None = "experts",
        on_step: Callable[[], object] | None = None,
        plan: PhasePlan | None = None,
    ) -> Tensor:
        """Sample with the experts, without guidance.

        Args:
            pairs: Index of the prompt and seed of each sample.
            progress: The label of a bar; None for no bar.
            on_step: Called after each step of each batch.
            plan: A refinement of the experts' own plan (``PhasePlan.refined``); their own when None.

        Returns:
            Latents of shape (pairs, ...).

        Raises:
            ValueError: When the sampler was made without experts.
        """
        if self.plan is None:
            raise ValueError("this sampler was made without experts")
        plan = self.plan if plan is None else plan

        def velocity(indices: Tensor) -> Velocity:
            conditioning = self.prompts.conditioning(indices, self.device)
            return route(expert_velocities(self.roles, plan, conditioning), plan)

        return self._sample(pairs, plan.sigmas, velocity, progress, on_step)

    def with_teacher(
        self,
        pairs: Sequence[tuple[int, int]],
        steps: int,
        shift: float,
        guidance_scale: float,
        progress: str | None = "teacher",
        on_step: Callable[[], object] | None = None,
    ) -> Tensor:
        """Sample with the teacher alone: Euler steps, uniform in raw time under a shift.

        Args:
            pairs: Index of the prompt and seed of each sample.
            steps: The number of steps.
            shift: Their shift, above 0.
            guidance_scale: Classifier-free guidance; 1 is none.
            progress: The label of a bar; None for no bar.
            on_step: Called after each step of each batch.

        Returns:
            Latents of shape (pairs, ...).

        Raises:
            PhasePlanError: When steps and shift make no plan.
        """
        sigmas = PhasePlan.from_steps([steps], shift).sigmas

        def velocity(indices: Tensor) -> Velocity:
            conditioning, negative = self.prompts.conditioning_pair(indices, self.device)
            return lambda x, sigma: guided_velocity(self.roles, x, sigma, conditioning, negative, guidance_scale)

        return self._sample(pairs, sigmas, velocity, progress, on_step)

    def _sample(
        self,
        pairs: Sequence[tuple[int, int]],
        sigmas: Sequence[float],
        velocity: Callable[[Tensor], Velocity],
        progress: str | None,
        on_step: Callable[[], object] | None,
    ) -> Tensor:
        parts = [pairs[i : i + self.batch] for i in range(0, len(pairs), self.batch)]
        latents = []
        with progress_bar(total=len(parts) * len(sigmas), desc=progress, disable=progress is None, leave=False) as bar:

            def stepped(step: int, of: int) -> None:
                bar.update()
                if on_step is not None:
                    on_step()

            for part in parts:
                indices = torch.tensor([prompt for prompt, _ in part])
                noise = self.noise([seed for _, seed in part])
                latents.append(sample(velocity(indices), sigmas, noise, stepped))
        return torch.cat(latents)

    def decode(self, latents: Tensor, progress: str | None = "decode") -> Tensor:
        """Decode latents.

        Args:
            latents: Of shape (count, ...).
            progress: The label of a bar; None for no bar.

        Returns:
            Pixels in [0, 1] on the CPU, of shape (count, frames, 3, height, width).
        """
        parts = latents.split(decoded_at_once(self.size))
        shown = progress_bar(parts, desc=progress, disable=progress is None, leave=False)
        return torch.cat(list(decoded(self.family, self.pipeline, shown, self.device, self.decoding)))


class Decoder:
    """The autoencoder of a teacher, without its networks, in float32.

    Args:
        source: Where the teacher is.
        size: Of the samples.
        device: As torch names it; a GPU where there is one when None.
        decoding: How latents are decoded.

    Raises:
        TeacherError: When there is no such teacher.
    """

    def __init__(
        self, source: TeacherSource, size: SampleSize, device: str | None = None, decoding: Decoding = "auto"
    ) -> None:
        self.family, self.decoding, self.device = family_of_source(source), decoding, default_device(device)
        self.pipeline = load_without_networks(source, torch.float32)
        self.batch = decoded_at_once(size)

    def __call__(self, latents: Tensor) -> Tensor:
        """Decode latents (count, ...) to pixels in [0, 1] on the CPU, of shape (count, frames, 3, height, width)."""
        parts = decoded(self.family, self.pipeline, latents.split(self.batch), self.device, self.decoding)
        return torch.cat(list(parts))


def family_of_source(source: TeacherSource) -> ModelFamily:
    """Tell the family of a teacher, of which no weights are read.

    Raises:
        TeacherError: When there is no such teacher, or none of a known family.
    """
    try:
        return family_of(str((source.index().get("transformer") or [None, None])[1]))
    except ValueError as error:
        raise TeacherError(f"the teacher {source.path!r}: {error}") from None


def decoded_at_once(size: SampleSize) -> int:
    """Choose how many samples of a size are decoded at once."""
    return max(1, min(32, _PIXELS_AT_ONCE // (3 * size.height * size.width * size.frames)))

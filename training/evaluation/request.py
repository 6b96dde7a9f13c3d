"""What a comparison of methods is asked for: the options of ``training/evaluate.py``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pdmd_core.experts import PhasedExperts
from training.config.command_line import UserError
from training.evaluation.comparison import METRICS
from training.evaluation.distilled import GivenSize, noted, teacher_source
from training.evaluation.methods import Teacher

if TYPE_CHECKING:  # they import diffusers, and --help needs this module
    from training.evaluation.evaluation import Evaluation
    from training.evaluation.sampler import Offload
    from training.evaluation.selection import Selection
    from training.memory.decoding import Decoding
    from training.memory.quantization import Quantization

TEACHER_STEPS = 40
"""Steps of the reference, by default."""
_SHIFT, _GUIDANCE = 3.0, 4.0
"""Of a teacher whose experts do not say how they were distilled."""


@dataclass(frozen=True)
class Request:
    """The options, by their names; None is what the experts were distilled with, or what suits the samples."""

    experts: Sequence[str]
    output_dir: Path
    teacher: str | None
    pipeline: str | None
    prompts: str
    seeds: int
    few_steps: Sequence[int] | None
    no_noise_floor: bool
    data: Path | None
    metrics: Sequence[str] | None
    features: Sequence[str] | None
    dino_weights: Path | None
    lpips_weights: tuple[Path, Path] | None
    teacher_steps: int | None
    shift: float | None
    guidance_scale: float | None
    negative_prompt: str | None
    height: int | None
    width: int | None
    frames: int | None
    max_sequence_length: int | None
    device: str | None
    batch_size: int | None
    dtype: str
    cache_dir: Path | None
    no_sampling: bool
    shown_prompts: int
    image_reward: Path | None = None
    quantization: Sequence[Quantization] = ()
    strengths: Sequence[float] = ()
    vbench: Path | None = None
    frame_rate: float | None = None
    offload: Offload = "none"
    decode: Decoding = "auto"

    @property
    def steps_of_reference(self) -> int:
        """Steps of the teacher that everything is compared with."""
        return TEACHER_STEPS if self.teacher_steps is None else self.teacher_steps

    def evaluation(self, experts: Mapping[str, PhasedExperts]) -> Evaluation:
        """Teacher, size, prompts and seeds: what the options say, otherwise what experts were distilled with.

        Args:
            experts: Name of the row to its experts; the first ones decide what differs between them.

        Raises:
            UserError: When experts differ in size, or note what cannot be.
            PromptError: When the prompts cannot be read.
            TeacherError: When there is no such teacher.
        """
        import torch

        from training.data.examples import read_examples
        from training.evaluation.evaluation import Evaluation, Machine

        first = next(iter(experts.values())).manifest
        size = GivenSize(self.width, self.height, self.frames, self.max_sequence_length).complete(experts)
        shift, guidance, negative = self.shift, self.guidance_scale, self.negative_prompt
        if shift is None:
            shift = _SHIFT if first.plan.shift is None else first.plan.shift
        if guidance is None:
            guidance = float(noted(first, "teacher_guidance_scale", (int, float), _GUIDANCE))
        if negative is None:
            negative = noted(first, "negative_prompt", str, "")
        source = teacher_source(next(iter(experts.values())), self.teacher, self.pipeline)
        return Evaluation(
            Teacher(source, shift, guidance, negative),
            size,
            read_examples(self.prompts),
            self.seeds,
            self.output_dir / "cache" if self.cache_dir is None else self.cache_dir,
            Machine(self.device, self.batch_size, getattr(torch, self.dtype), self.offload, self.decode),
        )

    def refuse_unheard(self, teacher: Teacher, selection: Selection, steps: Collection[int]) -> None:
        """Refuse an option that nothing would come of.

        Args:
            teacher: How the teacher samples.
            selection: What is measured.
            steps: In how many steps the teacher samples; empty when it does not.

        Raises:
            UserError: The option, and what it is for.
        """
        chosen = {*selection.metrics, *selection.left_out}
        in_features = any(METRICS[name].in_features for name in chosen)
        dino = in_features and (self.features is None or "dinov3" in self.features)
        for option, value, heard, what in (
            ("--data", self.data, "data_frechet" in chosen, "the metric data_frechet"),
            ("--lpips_weights", self.lpips_weights, "lpips" in chosen, "the metric lpips"),
            ("--image_reward", self.image_reward, "image_reward" in chosen, "the metric image_reward"),
            ("--features", self.features, in_features, "metrics of features"),
            ("--dino_weights", self.dino_weights, dino, "metrics of the features dinov3"),
            ("--teacher_steps", self.teacher_steps, self.teacher_steps in steps, "a noise floor or a reference"),
            ("--shift", self.shift, bool(steps), "a teacher that samples"),
            ("--guidance_scale", self.guidance_scale, bool(steps), "a teacher that samples"),
            ("--negative_prompt", self.negative_prompt, bool(steps) and teacher.guided, "a teacher with guidance"),
            ("--frame_rate", self.frame_rate, self.vbench is not None, "the clips of --vbench"),
            ("--batch_size", self.batch_size, not self.no_sampling, "sampling, which --no_sampling rules out"),
        ):
            if value is not None and not heard:
                raise UserError(f"{option} is for {what}: nothing would come of it here, leave it out")

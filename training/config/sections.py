"""Sections of the configuration: one for each part of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pdmd_core.distillation import Objective
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import RoleSpec
from training.data.examples import ExampleSource


class Section(BaseModel):
    """A part of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSection(Section):
    """The teacher and the size of its samples."""

    path: str = Field(description="diffusers pipeline of the teacher: a folder or a Hub id")
    revision: str | None = Field(None, description="Hub revision of the teacher")
    pipeline: str | None = Field(
        None, description="diffusers pipeline class, for example WanImageToVideoPipeline; the one path names if null"
    )
    architecture: Path | None = Field(
        None, description="folder with the pipeline's configs: --dry-run then needs no download"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the frozen base network")
    quantization: Literal["none", "int8", "float8"] = Field(
        "none",
        description="matrices of the frozen base's blocks in 8 bits (takes the package torchao); LoRA roles only",
    )
    height: int = Field(64, gt=0, description="height of the samples in pixels")
    width: int = Field(64, gt=0, description="width of the samples in pixels")
    frames: int = Field(1, gt=0, description="frames of a sample; 1 for pictures")
    max_sequence_length: int = Field(512, gt=0, description="tokens to which prompts are padded")


class PlanSection(Section):
    """The phase plan: steps and shift, or explicit sigmas."""

    steps: list[int] | None = Field(None, description="steps in each phase, high noise first, for example [2, 2]")
    shift: float = Field(5.0, gt=0, description="shift applied to uniform raw times (with steps)")
    sigmas: list[list[float]] | None = Field(None, description="sigmas of each phase, instead of steps and shift")
    names: list[str] | None = Field(None, description="names of the experts; high_noise, low_noise for two phases")

    @model_validator(mode="after")
    def _is_a_plan(self) -> PlanSection:
        if (self.steps is None) == (self.sigmas is None):
            raise ValueError("give either steps (with shift) or sigmas")
        self.build()
        return self

    def build(self) -> PhasePlan:
        """The plan that these fields describe."""
        if self.sigmas is not None:
            return PhasePlan.from_sigmas(self.sigmas, self.names)
        return PhasePlan.from_steps(self.steps or [], self.shift, self.names)


class ObjectiveSection(Section):
    """The method; see pdmd_core/objectives.py."""

    guidance_scale: float = Field(4.0, ge=1, description="classifier-free guidance of the teacher; 1 is none")
    fake_weighting: Literal["clamp", "margin", "none"] = Field(
        "clamp", description="how the fake's squared error is weighted near the end of the phase"
    )
    fake_target: Literal["unbiased", "biased"] = Field("unbiased", description="biased is an ablation")
    generator_weighting: Literal["dmd2", "paper"] = Field("dmd2", description="weight of the generator's gradient")
    score_range: Literal["nested", "disjoint"] = Field(
        "nested", description="compare scores in (end of phase, 1), or only inside the phase (ablation)"
    )
    score_shift: float = Field(1.0, gt=0, description="scores are compared at raw times uniform under this shift")
    margin: float = Field(0.02, ge=0, lt=1, description="distance from the end of the phase with weighting margin")

    def build(self) -> Objective:
        """The objective that these fields describe."""
        return Objective(**self.model_dump())


class RoleSection(Section):
    """Weights and optimizer (AdamW) of a trained role."""

    kind: Literal["lora", "full"] = Field("lora", description="adapter on the frozen base, or a full copy")
    rank: int = Field(64, ge=1, description="LoRA rank")
    alpha: float = Field(8.0, gt=0, description="LoRA alpha; the adapter is scaled by alpha / rank")
    targets: list[str] | None = Field(None, description="LoRA module suffixes; the family's by default")
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="moments in float32, or in 8 bits (takes the package torchao)"
    )
    lr: float = Field(5e-5, gt=0, description="learning rate")
    betas: tuple[float, float] = Field((0.0, 0.999), description="AdamW betas")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm is clipped to this")

    def build(self, *components: str) -> RoleSpec:
        """How the role holds its weights on these networks of the teacher."""
        return RoleSpec(self.kind, self.rank, self.alpha, tuple(self.targets) if self.targets else None, components)


class GeneratorSection(RoleSection):
    """Weights and optimizer (AdamW) of the experts."""

    component: Literal["transformer", "transformer_2"] | None = Field(
        None,
        description="which network of a two-network teacher all experts stand on; the one of their sigmas if null",
    )


class BucketSection(Section):
    """A size of training samples."""

    width: int = Field(gt=0, description="pixels")
    height: int = Field(gt=0, description="pixels")
    frames: int = Field(1, gt=0, description="frames; 1 for pictures")
    share: float | None = Field(
        None, gt=0, description="how often it is drawn, relative to the others; as often as it has examples if null"
    )


class DataSection(Section):
    """Which columns of the prompts' file or dataset are read, and in what sizes its examples are trained."""

    prompt_column: str = Field("prompt", description="column or key of the prompt")
    image_column: str = Field("image", description="column or key of the image, for teachers that take one")
    subset: str | None = Field(None, description="of a dataset: its configuration")
    split: str = Field("train", description="of a dataset: its split")
    revision: str | None = Field(None, description="of a dataset on the Hub: its revision")
    limit: int | None = Field(None, ge=1, description="examples that are read; all if null")
    buckets: list[BucketSection] | Literal["columns"] | None = Field(
        None,
        description="sizes (width, height, frames, share); columns takes them from columns of these names; the size in "
        "model if null",
    )

    @model_validator(mode="after")
    def _shares_are_all_or_none(self) -> DataSection:
        if isinstance(self.buckets, list):
            given = sum(bucket.share is not None for bucket in self.buckets)
            if not self.buckets or 0 < given < len(self.buckets):
                count = len(self.buckets)
                raise ValueError(f"buckets: a share is for all of them or for none, found {given} of {count}")
        return self

    def source(self, location: Path) -> ExampleSource:
        """The examples there."""
        return ExampleSource(
            str(location),
            self.prompt_column,
            self.image_column,
            self.buckets is not None,
            self.subset,
            self.split,
            self.revision,
            self.limit,
        )


class WatchSection(Section):
    """What is looked after in a run; thresholds of its warnings."""

    page: bool = Field(True, description="write report.html at validations and at the end")
    window: int = Field(20, ge=3, description="updates over which numbers are medians before they are compared")
    diversity_fall: float = Field(
        0.6, gt=0, lt=1, description="warn when seeds differ by less than this part of what they differed by"
    )
    saturation_rise: float = Field(
        1.5, gt=1, description="warn when saturation or contrast is this many times that of the phase's first samples"
    )
    fake_loss_rise: float = Field(1.5, gt=1, description="warn when the fake's loss is this many times what it was")
    grad_norm_rise: float = Field(10.0, gt=1, description="warn when a gradient norm is this many times its first")
    smallest_motion: float = Field(
        1e-4, gt=0, description="warn when weights will move by less of their size than this in a phase"
    )
    share_of_time: float = Field(
        0.02, ge=0, le=1, description="of the run that watching may take: report.html waits for the end beyond it"
    )

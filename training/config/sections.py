"""Sections of the configuration: one for each part of a run.

The text under a field is its description in ``--help``. A section that says what an object of the library or of the
data is made of is that object's own dataclass, or extends it; such a section checks itself wherever it is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pdmd_core.checks import check_choice, check_number
from pdmd_core.experts import MANIFEST_NAME, ExpertsError, read_manifest
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import FAKE, TEACHER, RoleSpec
from training.data.buckets import Bucket
from training.data.examples import ExampleSource

Count = Annotated[int, Field(ge=1)]
Optimizer = Literal["adamw", "adamw_8bit"]
Tracker = Literal["tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"]
"""Those that accelerate knows."""
Attention = Literal["native", "cudnn", "flash"]


class Section(BaseModel):
    """A part of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ModelSection(Section):
    """The teacher and the size of its samples."""

    path: str
    """Diffusers pipeline of the teacher: a folder or a Hub id."""
    revision: str | None = None
    """Hub revision of the teacher."""
    pipeline: str | None = None
    """Diffusers pipeline class, for example WanImageToVideoPipeline; the one path names if null."""
    experts: Path | None = None
    """Experts folder that teaches, each expert at the sigmas of its interval; the model is their base then. An experts
    folder in path is this, with the base that it names. The model itself teaches if null."""
    architecture: Path | None = None
    """Folder with the pipeline's configs: --dry-run then needs no download."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the frozen base network."""
    quantization: Literal["none", "int8", "float8", "nf4"] = "none"
    """Matrices of the frozen base's blocks in 8 bits (takes torchao) or in 4 (takes bitsandbytes); LoRA roles only."""
    height: Count = 64
    """Height of the samples in pixels."""
    width: Count = 64
    """Width of the samples in pixels."""
    frames: Count = 1
    """Frames of a sample; 1 for pictures."""
    max_sequence_length: Count = 512
    """Tokens to which prompts are padded."""

    @model_validator(mode="before")
    @classmethod
    def _an_experts_folder_teaches(cls, data: Any) -> Any:
        path = data.get("path") if isinstance(data, dict) else None
        if not isinstance(path, str) or not (Path(path) / MANIFEST_NAME).is_file():
            return data
        if data.get("experts") is not None:
            raise ValueError(f"path: expected the pipeline of the base beside experts, found other experts, {path}")
        try:
            base = read_manifest(Path(path)).base
        except ExpertsError as error:
            raise ValueError(f"path: {error}") from None
        return {**data, "path": base.model, "revision": data.get("revision") or base.revision, "experts": path}


@dataclass(frozen=True)
class DataSection(ExampleSource):
    """What is trained on: prompts, the columns they are read from, the sizes of samples."""

    negative_prompt: str = ""
    """What the teacher's guidance moves away from."""
    buckets: list[Bucket] | Literal["columns"] | None = None
    """Sizes (width, height, frames, share); columns takes them from columns of these names. The size in model if
    null."""
    cache_dir: Path | None = None
    """Where encoded prompts are kept; cache/ of output_dir if null."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.buckets, list):
            given, count = sum(bucket.share is not None for bucket in self.buckets), len(self.buckets)
            if not count:
                raise ValueError("buckets: expected at least one size, or null, found none")
            if 0 < given < count:
                raise ValueError(f"buckets: a share is for all of them or for none, found {given} of {count}")

    @property
    def sizes(self) -> bool:
        """Whether the columns width, height and frames are read: they choose among buckets."""
        return self.buckets is not None


class PlanSection(Section):
    """The phase plan: steps and shift, or explicit sigmas."""

    steps: list[int] | None = None
    """Steps in each phase, high noise first, for example [2, 2]."""
    shift: Annotated[float, Field(gt=0)] = 5.0
    """Shift applied to uniform raw times (with steps)."""
    sigmas: list[list[float]] | None = None
    """Sigmas of each phase, instead of steps and shift."""
    names: list[str] | None = None
    """Names of the experts; high_noise, low_noise for two phases."""

    @model_validator(mode="after")
    def _is_a_plan(self) -> PlanSection:
        if (self.steps is None) == (self.sigmas is None):
            raise ValueError("give either steps (with shift) or sigmas")
        if self.sigmas is not None and self.shift != type(self).model_fields["shift"].default:
            raise ValueError(f"shift is for steps, sigmas are shifted: leave it out, found {self.shift:g}")
        for phase in self.build().phases:
            if phase.name.startswith((TEACHER, FAKE)):
                raise ValueError(f"names: expected names of experts, found {phase.name!r}: call it otherwise")
        return self

    def build(self) -> PhasePlan:
        """The plan that these fields describe."""
        if self.sigmas is not None:
            return PhasePlan.from_sigmas(self.sigmas, self.names)
        return PhasePlan.from_steps(self.steps or [], self.shift, self.names)


@dataclass(frozen=True)
class RoleSection(RoleSpec):
    """Weights and optimizer of a trained role."""

    optimizer: Optimizer = "adamw"
    """AdamW with moments in float32, or in 8 bits (takes the package torchao)."""
    lr: float = 5e-5
    """Learning rate."""
    betas: tuple[float, float] = (0.0, 0.999)
    """AdamW betas."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm is clipped to this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("optimizer", self.optimizer, Optimizer)
        check_number("lr", self.lr, above=0)
        for beta in self.betas:
            check_number("betas", beta, at_least=0, below=1)
        check_number("weight_decay", self.weight_decay, at_least=0)
        check_number("max_grad_norm", self.max_grad_norm, above=0)


class StartSection(Section):
    """What a run starts from beside the teacher."""

    experts: Path | None = None
    """Experts folder that the run starts from, or a LoRA file (with warm)."""
    phase: str | None = None
    """First phase that is trained; the experts of earlier ones are those of start.experts, frozen. The first if
    null."""
    warm: bool = False
    """Phases that train begin from start.experts, also of another kind or rank, instead of from the teacher."""


class RolloutsSection(Section):
    """What rollouts begin with."""

    bank: Count | None = None
    """Samples that the frozen experts of earlier phases make once, when a phase begins, and from which all its rollouts
    begin; null runs those experts in every rollout. With expert_loss denoising, samples of the teacher."""


class ParallelSection(Section):
    """How several processes share a run."""

    sharding: Literal["none", "fsdp", "hsdp"] = "none"
    """Spread the base and full copies over all processes, or over groups of them (hsdp); adapters stay whole."""
    shard_size: Count | None = None
    """Processes in a group with sharding hsdp; those of one node if null."""
    context_parallel: Count = 1
    """Processes that share the tokens of one sample, for samples that do not fit one GPU."""
    timeout_minutes: Count = 60
    """Processes that wait longer than this for another one end: it may have failed where nothing ends them."""


class MemorySection(Section):
    """What saves memory, mostly for time."""

    micro_batch_size: Count | None = None
    """Samples a process evaluates at once, gradients add up; all of its share if null."""
    gradient_checkpointing: bool = False
    """Recompute activations to save memory."""
    offload_activations: bool = False
    """What is kept for the backward pass, the inputs of checkpointed blocks, waits in host memory."""
    guidance_batched: bool = True
    """The teacher sees prompt and negative prompt in one batch; two evaluations take less memory."""
    offload_idle_network: bool = False
    """Of a two-network teacher, keep only the network that runs on the device."""
    offload_idle_experts: bool = False
    """Keep experts that do not train off the device, but while they compute."""
    swap_blocks: Annotated[int, Field(ge=0)] = 0
    """Frozen weights of this many blocks of each network of the teacher, the last ones, wait in host memory; the device
    holds those of two of them at a time."""

    @model_validator(mode="after")
    def _is_recomputed(self) -> MemorySection:
        if self.offload_idle_network and not self.gradient_checkpointing:
            raise ValueError("offload_idle_network: frees memory only with memory.gradient_checkpointing: true")
        if self.swap_blocks and not self.gradient_checkpointing:
            raise ValueError(
                "swap_blocks: weights go before the backward pass, with memory.gradient_checkpointing: true"
            )
        if self.swap_blocks and self.offload_idle_network:
            raise ValueError("swap_blocks: is for the blocks of all networks, leave memory.offload_idle_network out")
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError("offload_activations: is for inputs of blocks, with memory.gradient_checkpointing: true")
        return self


class CheckpointsSection(Section):
    """From what a run goes on."""

    every: Count = 200
    """Updates between checkpoints."""
    keep: Count = 2
    """How many of the newest checkpoints stay on disk; that of the end of each phase stays too."""
    keep_every: Count | None = None
    """Checkpoints of updates that are multiples of this stay for good."""
    background: bool = False
    """Write them in a thread of each process, from a copy in host memory, while updates go on."""
    best: Literal["teacher_distance", "frechet"] | None = None
    """Measure of validations by which the best checkpoint of each phase stays too; null is without."""
    patience: Count | None = None
    """Validations in a row without a better one after which the run stops; null is never."""

    @model_validator(mode="after")
    def _keeps_what_is_written(self) -> CheckpointsSection:
        if self.keep_every is not None and self.keep_every % self.every:
            raise ValueError(
                f"keep_every: expected a multiple of checkpoints.every, {self.every}, found {self.keep_every}"
            )
        if self.patience is not None and self.best is None:
            raise ValueError("patience: by which measure is better? give checkpoints.best, or leave it out")
        return self


class ValidationSection(Section):
    """Sample grids of fixed prompts and seeds."""

    every: Count | None = 200
    """Updates between sample grids; null is only before the first update and at the end of a phase."""
    prompts: Annotated[list[str], Field(min_length=1)] | None = None
    """Prompts of the grids; the first training prompts if null."""
    seeds: Count = 4
    """Seeds for each prompt of the grids."""
    decode: Literal["auto", "whole", "tiled", "cpu"] = "auto"
    """How samples are decoded: whole, in tiles or on the CPU; auto is the first of them for which there is memory."""
    teacher_steps: Count | None = 40
    """Steps of the teacher's own samples of the same prompts and noise, which are made once; null is without."""
    features: Literal["emoji", "efflite0"] | None = None
    """Network in whose features Frechet distance to the teacher and diversity are measured; null is without."""
    features_every: Count | None = None
    """Updates between these; at every validation if null."""
    features_prompts: Count = 16
    """First training prompts that are sampled for these, with the seeds of the grids."""

    @model_validator(mode="after")
    def _measures_what_is_sampled(self) -> ValidationSection:
        if self.features is not None and self.teacher_steps is None:
            raise ValueError("features: compared with the teacher, which teacher_steps null leaves out: give steps")
        if self.features_every is not None and (self.every is None or self.features_every % self.every):
            raise ValueError(
                f"features_every: expected a multiple of validation.every, {self.every}, found {self.features_every}"
            )
        return self


class MonitoringSection(Section):
    """Numbers, warnings and the page of a run."""

    tracker: Tracker | None = "tensorboard"
    """Where numbers and samples are shown beside the page, or null; all but tensorboard take a package of that name."""
    log_every: Count = 10
    """Updates between lines of metrics.jsonl and tracker points."""
    page: bool = True
    """Write report.html at validations and at the end."""
    window: Annotated[int, Field(ge=3)] = 20
    """Updates over which numbers are medians before they are compared."""
    diversity_fall: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Warn when seeds differ by less than this part of what they differed by."""
    saturation_rise: Annotated[float, Field(gt=1)] = 1.5
    """Warn when saturation or contrast is this many times the phase's first and above the teacher's."""
    above_teacher: Annotated[float, Field(gt=1)] = 1.1
    """Warn when saturation, contrast or motion is this many times that of the teacher's samples."""
    below_teacher: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Warn when these or the difference between seeds, in the last phase, are less than this part of the teacher's."""
    teacher_distance_rise: Annotated[float, Field(gt=1)] = 1.5
    """Warn when samples are this many times as far from the teacher's own as they were at best."""
    score_distance_rise: Annotated[float, Field(gt=1)] = 1.4
    """Warn when fake and teacher are this many times as far apart as when the phase began."""
    frechet_rise: Annotated[float, Field(gt=1)] = 2.0
    """Warn when the Frechet distance to the teacher is this many times what it was at best."""
    stop_when_broken: bool = False
    """Stop a run whose samples and scores both leave the teacher's."""
    fake_loss_rise: Annotated[float, Field(gt=1)] = 1.5
    """Warn when the fake's loss is this many times what it was."""
    grad_norm_rise: Annotated[float, Field(gt=1)] = 10.0
    """Warn when a gradient norm is this many times its first."""
    smallest_drift: Annotated[float, Field(gt=0)] = 1e-4
    """Warn when weights will move by less of their size than this in a phase."""
    share_of_time: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Of the run that watching may take: report.html waits for the end beyond it."""


class ExportSection(Section):
    """The files of the experts."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of expert files."""

"""The configuration of a distillation: one typed tree, read from YAML, overridden on the command line.

Every field has a description; ``python training/distill.py --help`` prints them. Unknown keys are refused with the
nearest known name.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pdmd_core.distillation import Objective
from pdmd_core.families import TeacherRouting
from pdmd_core.phases import Phase, PhasePlan, PhasePlanError
from pdmd_core.roles import FAKE, RoleSpec
from training.command_line import UserError
from training.data.examples import ExampleSource


class ConfigError(UserError):
    """A configuration that cannot be run: one line for each problem."""


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


class DistillConfig(Section):
    """Everything that decides a run."""

    model: ModelSection = Field(description="the teacher")
    prompts: Path = Field(
        description="training prompts: text, one a line; .csv, .tsv, .jsonl, .parquet; a dataset's folder or Hub id"
    )
    data: DataSection = Field(DataSection(), description="which columns are read, and in what sizes")
    negative_prompt: str = Field("", description="what the teacher's guidance moves away from")
    plan: PlanSection = Field(description="the phase plan")
    objective: ObjectiveSection = Field(ObjectiveSection(), description="the losses")
    generator: GeneratorSection = Field(GeneratorSection(), description="the experts")
    fake: RoleSection = Field(RoleSection(), description="the fake score network")
    updates: int | list[int] = Field(1000, description="generator updates in each phase; a list gives one per phase")
    batch_size: int = Field(64, gt=0, description="samples of an update, divided among all processes")
    micro_batch_size: int | None = Field(
        None, gt=0, description="samples a process evaluates at once, gradients add up; all of its share if null"
    )
    fake_updates: int = Field(5, ge=1, description="fake updates before each generator update")
    draws_per_rollout: int = Field(
        1, ge=1, description="fake gradient steps (fresh noise and sigma) taken on the samples of one rollout"
    )
    lr_decay_share: float = Field(
        0.0, ge=0, le=1, description="learning rates fall linearly to zero over this last share of each phase"
    )
    ema_decay: float | None = Field(None, gt=0, lt=1, description="average of the expert's weights; null is off")
    precision: Literal["no", "bf16"] = Field("no", description="autocast of the forward passes")
    gradient_checkpointing: bool = Field(False, description="recompute activations to save memory")
    compile: Literal["none", "regional"] = Field(
        "none", description="torch.compile each repeated block of the networks; the first updates take minutes then"
    )
    guidance_batched: bool = Field(
        True, description="the teacher sees prompt and negative prompt in one batch; two evaluations take less memory"
    )
    offload_idle_network: bool = Field(
        False, description="of a two-network teacher, keep only the network that runs on the device"
    )
    offload_idle_experts: bool = Field(
        False, description="keep experts that do not train off the device, but while they compute"
    )
    sharding: Literal["none", "fsdp", "hsdp"] = Field(
        "none",
        description="spread the base and full copies over all processes, or over groups of them (hsdp); adapters stay "
        "whole",
    )
    shard_size: int | None = Field(
        None, ge=1, description="processes in a group with sharding hsdp; those of one node if null"
    )
    seed: int = Field(0, ge=0, description="seed of weights, prompts, noise and sigmas")
    output_dir: Path = Field(Path("runs/distill"), description="where everything is written")
    tracker: str | None = Field("tensorboard", description="a tracker that accelerate knows, or null")
    log_every: int = Field(10, ge=1, description="updates between lines of metrics.jsonl and tracker points")
    checkpoint_every: int = Field(200, ge=1, description="updates between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="how many checkpoints stay on disk")
    sample_every: int | None = Field(
        200, description="updates between sample grids; null is only at the end of a phase"
    )
    sample_prompts: list[str] | None = Field(
        None, description="prompts of the grids; the first training prompts if null"
    )
    sample_seeds: int = Field(4, ge=1, description="seeds for each prompt of the grids")
    watch: WatchSection = Field(WatchSection(), description="warnings and the page of a run")
    cache_dir: Path | None = Field(None, description="where encoded prompts are kept; cache/ of output_dir if null")
    max_bad_updates: int = Field(10, ge=1, description="stop after this many updates in a row with NaN or Inf")
    expert_dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of expert files")

    @field_validator("updates")
    @classmethod
    def _positive(cls, value: int | list[int]) -> int | list[int]:
        if any(n < 1 for n in (value if isinstance(value, list) else [value])):
            raise ValueError("updates are at least 1 in each phase")
        return value

    @model_validator(mode="after")
    def _placements_agree(self) -> DistillConfig:
        if self.shard_size is not None and self.sharding != "hsdp":
            raise ValueError(f"shard_size is for sharding hsdp, found sharding {self.sharding}: leave it out")
        if self.offload_idle_network and self.sharding != "none":
            raise ValueError("offload_idle_network keeps networks whole: set sharding to none, or leave it out")
        if self.offload_idle_experts and self.sharding != "none":
            raise ValueError("offload_idle_experts keeps experts whole: set sharding to none, or leave it out")
        if self.compile != "none" and self.sharding != "none":
            raise ValueError("compile is for networks that are whole: set sharding to none, or compile to none")
        for section, role in (("generator", self.generator), ("fake", self.fake)):
            if self.sharding != "none" and role.kind == "full" and role.optimizer != "adamw":
                raise ValueError(f"{section}.optimizer: {role.optimizer} is for weights that are whole: use adamw")
        if self.offload_idle_network and not self.gradient_checkpointing:
            raise ValueError("offload_idle_network frees memory only with gradient_checkpointing: true")
        return self

    @model_validator(mode="after")
    def _quantized_bases_are_whole_and_frozen(self) -> DistillConfig:
        if self.model.quantization == "none":
            return self
        for section, kind in (("generator", self.generator.kind), ("fake", self.fake.kind)):
            if kind != "lora":
                raise ValueError(
                    f"model.quantization is for frozen weights: set {section}.kind to lora, or leave it out"
                )
        if self.sharding != "none":
            raise ValueError("model.quantization keeps networks whole: set sharding to none, or leave it out")
        return self

    @model_validator(mode="after")
    def _one_number_for_each_phase(self) -> DistillConfig:
        phases = len(self.plan.build())
        if isinstance(self.updates, list) and len(self.updates) != phases:
            raise ValueError(f"updates lists {len(self.updates)} numbers for {phases} phases")
        return self

    def role_specs(self, routing: TeacherRouting) -> dict[str, RoleSpec]:
        """Every role but the teacher and how it holds its weights. Raises ConfigError.

        An expert stands on the network of its sigmas, the fake on all of them, as the teacher does.
        """
        specs = {
            phase.name: self.generator.build(self._component_of(phase, routing)) for phase in self.plan.build().phases
        }
        return specs | {FAKE: self.fake.build(*routing.components)}

    def _component_of(self, phase: Phase, routing: TeacherRouting) -> str:
        chosen = self.generator.component
        if chosen is not None and chosen not in routing.components:
            raise ConfigError(f"generator.component: the teacher has no {chosen}, it is one network: leave it out")
        found = {routing.component_at(sigma) for sigma in phase.sigmas}
        if chosen is None and len(found) > 1:
            raise ConfigError(
                f"plan: phase {phase.name!r} runs at sigmas {phase.sigmas[0]:.4g} to {phase.sigmas[-1]:.4g}, on both "
                f"sides of the teacher's boundary {routing.boundary:.4g}: set generator.component to one of its "
                f"networks, {' or '.join(routing.components)}, or give the phases other sigmas"
            )
        return chosen or found.pop()

    def updates_of(self, phase: int) -> int:
        """Generator updates in this phase."""
        return self.updates[phase] if isinstance(self.updates, list) else self.updates


def fields_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted name, default, description) of every field, for ``--help`` and for suggestions."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from fields_of(inner, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else str(field.get_default(call_default_factory=True))
        if get_origin(inner) is Literal:
            default += f" of {'|'.join(get_args(inner))}"
        yield f"{prefix}{name}", default, field.description or ""


def with_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply dotted overrides ``key.inner=value`` (leading dashes are fine; the value is YAML). Raises ConfigError."""
    merged: dict[str, Any] = json.loads(json.dumps(data, default=str))  # a YAML anchor shares what must be separate
    for text in overrides:
        key, equals, value = text.lstrip("-").partition("=")
        if not equals or not key:
            raise ConfigError(f"an override is key.inner=value, found {text!r}; --help lists the keys")
        *parents, last = key.split(".")
        place = merged
        for parent in parents:
            child = place.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"override {key!r}: {parent!r} holds a value, not a section")
            place = child
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"override {key!r}: {value!r} is not a YAML value") from None
    return merged


def load_config(path: Path, overrides: Sequence[str] = ()) -> DistillConfig:
    """Read a YAML file, apply overrides, check everything. Raises ConfigError with one line for each problem."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config; training/configs/ has examples") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, found {type(data).__name__}")
    return parse_config(with_overrides(data, overrides), str(path))


def parse_config(data: Mapping[str, Any], source: str) -> DistillConfig:
    """Check a configuration given as plain data. Raises ConfigError."""
    try:
        return DistillConfig.model_validate(dict(data))
    except (ValidationError, PhasePlanError) as error:
        if isinstance(error, PhasePlanError):
            raise ConfigError(f"{source}: plan: {error}") from None
        raise ConfigError("\n".join(f"{source}: {_line(problem)}" for problem in error.errors())) from None


def with_defaults(data: dict[str, Any]) -> dict[str, Any]:
    """A configuration as plain data with all of today's keys; unchanged when it is not valid today."""
    try:
        return json.loads(DistillConfig.model_validate(data).model_dump_json())
    except ValidationError:
        return data


def _line(problem: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section, _, last = name.rpartition(".")
        known = [
            known
            for parent, _, known in (f.rpartition(".") for f, _, _ in fields_of(DistillConfig))
            if parent == section
        ]
        near = difflib.get_close_matches(last, known, n=1, cutoff=0.6)
        return f"unknown key {name!r}, " + (f"did you mean {near[0]!r}?" if near else f"expected: {', '.join(known)}")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{name} is required"
    shown = repr(problem["input"])
    found = "" if problem["type"] == "value_error" else f", found {shown if len(shown) < 60 else shown[:57] + '...'}"
    return f"{name + ': ' if name else ''}{message}{found}"

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
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from pdmd_core.families import TeacherRouting
from pdmd_core.phases import Phase, PhasePlanError
from pdmd_core.roles import FAKE, RoleSpec
from training.config.command_line import UserError
from training.config.sections import (
    DataSection,
    GeneratorSection,
    ModelSection,
    ObjectiveSection,
    PlanSection,
    RoleSection,
    Section,
    WatchSection,
)


class ConfigError(UserError):
    """A configuration that cannot be run: one line for each problem."""


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
    context_parallel: int = Field(
        1, ge=1, description="processes that share the tokens of one sample, for samples that do not fit one GPU"
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
        if self.compile != "none" and self.context_parallel > 1:
            raise ValueError("compile is for samples that are whole: set context_parallel to 1, or compile to none")
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

    def groups(self, processes: int) -> int:
        """Among how many groups of processes the samples of an update are divided."""
        return processes // self.context_parallel

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

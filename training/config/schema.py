"""The configuration of a distillation: one typed tree, read from YAML, overridden on the command line.

Every field has a description; ``python training/distill.py --help`` prints them. Unknown keys are refused with the
nearest known name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from pdmd_core.families import TeacherRouting
from pdmd_core.method import Objective, choices_without_use, fake_roles
from pdmd_core.phases import Phase, PhasePlanError
from pdmd_core.roles import RoleSpec
from training.config.command_line import UserError
from training.config.keys import fields_of, is_text, kind_of, takes_null
from training.config.moved import MOVED, moved_keys, with_todays_keys
from training.config.problems import in_quotes, leaves_of, lines_of
from training.config.sections import (
    Attention,
    CheckpointsSection,
    Count,
    DataSection,
    ExportSection,
    MemorySection,
    ModelSection,
    MonitoringSection,
    ParallelSection,
    PlanSection,
    RoleSection,
    RolloutsSection,
    Section,
    StartSection,
    ValidationSection,
)

MANY_STEPS = 20
"""A teacher samples well in."""


class ConfigError(UserError):
    """A configuration that cannot be run: one line for each problem."""


class DistillConfig(Section):
    """Everything that decides a run."""

    model: ModelSection
    """The teacher."""
    data: DataSection
    """What is trained on."""
    plan: PlanSection
    """The phase plan."""
    objective: Objective = Objective()
    """The losses."""
    generator: RoleSection = RoleSection()
    """The experts."""
    fake: RoleSection = RoleSection()
    """The fake score network."""
    start: StartSection = StartSection()
    """What a run starts from beside the teacher."""
    updates: int | list[int] = 1000
    """Generator updates in each phase; a list gives one per phase."""
    batch_size: Count = 64
    """Samples of an update, divided among all processes."""
    fake_updates: Count = 5
    """Fake updates before each generator update."""
    draws_per_rollout: Count = 1
    """Fake gradient steps (fresh noise and sigma) taken on the samples of one rollout."""
    score_groups: Count = 1
    """With a teacher of two networks, groups of a batch that are each compared on one of them."""
    lr_decay_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rates fall linearly to zero over this last share of each phase."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Average of the expert's weights; null is off."""
    ema_warm_up: bool = True
    """The average is over few updates at first: its decay is at most (1 + n) / (10 + n) after n updates."""
    max_bad_updates: Count = 10
    """Stop after this many updates in a row with NaN or Inf."""
    precision: Literal["no", "bf16"] = "no"
    """Autocast of the forward passes."""
    compile: Literal["none", "regional"] = "none"
    """torch.compile each repeated block of the networks; the first updates take minutes then."""
    attention: Attention = "native"
    """What computes attention; native where it does not run backwards on the device, which is said at the start."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of weights, prompts, noise and sigmas."""
    output_dir: Path = Path("runs/distill")
    """Where everything is written."""
    rollouts: RolloutsSection = RolloutsSection()
    """What rollouts begin with."""
    parallel: ParallelSection = ParallelSection()
    """How several processes share the run."""
    memory: MemorySection = MemorySection()
    """What saves memory."""
    checkpoints: CheckpointsSection = CheckpointsSection()
    """From what the run goes on."""
    validation: ValidationSection = ValidationSection()
    """Sample grids."""
    monitoring: MonitoringSection = MonitoringSection()
    """Numbers, warnings and the page of the run."""
    export: ExportSection = ExportSection()
    """The files of the experts."""

    @field_validator("updates")
    @classmethod
    def _positive(cls, value: int | list[int]) -> int | list[int]:
        if any(n < 1 for n in (value if isinstance(value, list) else [value])):
            raise ValueError("updates are at least 1 in each phase")
        return value

    @model_validator(mode="after")
    def _placements_agree(self) -> DistillConfig:
        memory, sharding, context_parallel = self.memory, self.parallel.sharding, self.parallel.context_parallel
        whole = "set parallel.sharding to none, or leave it out"
        if self.parallel.shard_size is not None and sharding != "hsdp":
            raise ValueError(f"parallel.shard_size is for sharding hsdp, found sharding {sharding}: leave it out")
        if memory.offload_idle_network and sharding != "none":
            raise ValueError(f"memory.offload_idle_network keeps networks whole: {whole}")
        if memory.offload_idle_network and len(self.fake.components or ()) == 1:
            raise ValueError("memory.offload_idle_network is for a fake on all networks: leave fake.components out")
        if memory.offload_idle_experts and sharding != "none":
            raise ValueError(f"memory.offload_idle_experts keeps experts whole: {whole}")
        if memory.swap_blocks and sharding != "none":
            raise ValueError(f"memory.swap_blocks keeps blocks whole: {whole}")
        if memory.swap_blocks and self.model.quantization != "none":
            raise ValueError("memory.swap_blocks is for plain weights: set model.quantization to none, or leave it out")
        if self.attention != "native" and context_parallel > 1:
            raise ValueError("attention of divided samples is native: leave attention or parallel.context_parallel out")
        for section, role in (("generator", self.generator), ("fake", self.fake)):
            if sharding != "none" and role.kind == "full" and role.optimizer != "adamw":
                raise ValueError(f"{section}.optimizer: {role.optimizer} is for weights that are whole: use adamw")
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
        if self.parallel.sharding != "none":
            raise ValueError("model.quantization keeps networks whole: set parallel.sharding to none, or leave it out")
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> DistillConfig:
        best, validation = self.checkpoints.best, self.validation
        if best is not None and validation.teacher_steps is None:
            raise ValueError(
                "checkpoints.best: compared with the teacher, which validation.teacher_steps null leaves out"
            )
        if best == "frechet" and validation.features is None:
            raise ValueError("checkpoints.best: frechet is measured with validation.features: name a network there")
        interval = validation.features_every if best == "frechet" and validation.features_every else validation.every
        if best is not None and (interval is None or interval % self.checkpoints.every):
            raise ValueError(
                f"checkpoints.best: measured every {interval} updates, checkpoints are every {self.checkpoints.every}: "
                "set checkpoints.every so that it divides that"
            )
        return self

    @model_validator(mode="after")
    def _one_number_for_each_phase(self) -> DistillConfig:
        phases = len(self.plan.build())
        if self.rollouts.bank is not None and phases == 1 and self.objective.expert_loss != "denoising":
            raise ValueError("rollouts.bank: is made by experts of earlier phases, this plan has one: leave it out")
        if isinstance(self.updates, list) and len(self.updates) != phases:
            raise ValueError(f"updates lists {len(self.updates)} numbers for {phases} phases")
        return self

    @model_validator(mode="after")
    def _starts_from_what_is_given(self) -> DistillConfig:
        names, start = [phase.name for phase in self.plan.build().phases], self.start
        if start.phase is not None and start.phase not in names:
            raise ValueError(f"start.phase: expected one of {', '.join(names)}, found {start.phase!r}")
        if start.experts is None and (start.phase not in (None, names[0]) or start.warm):
            raise ValueError("start.experts: expected an experts folder for start.phase or start.warm, found null")
        if start.experts is not None and self.first_phase == 0 and not start.warm:
            raise ValueError(
                "start.experts: nothing is taken from it: set start.warm to true, or start.phase to a later phase"
            )
        return self

    @property
    def first_phase(self) -> int:
        """Index of the first phase that is trained."""
        names = [phase.name for phase in self.plan.build().phases]
        return names.index(self.start.phase) if self.start.phase is not None else 0

    def role_specs(self, routing: TeacherRouting) -> dict[str, RoleSpec]:
        """Every role but the teacher, and how it holds its weights.

        Without ``components`` an expert stands on the network of its sigmas, the fake on all of them, as the teacher.

        Args:
            routing: The teacher's networks.

        Raises:
            ConfigError: The networks that are asked for cannot be, or a phase runs on two.
        """
        for section, role in (("generator", self.generator), ("fake", self.fake)):
            if unknown := [name for name in role.components or () if name not in routing.components]:
                raise ConfigError(
                    f"{section}.components: the teacher has no {' and no '.join(unknown)}, its networks are "
                    f"{' and '.join(routing.components)}"
                )
        specs: dict[str, RoleSpec] = {
            phase.name: replace(self.generator, components=(self._component_of(phase, routing),))
            for phase in self.plan.build().phases
        }
        fake = replace(self.fake, components=self.fake.components or routing.components)
        return specs | dict.fromkeys(fake_roles(self.plan.build(), self.objective), fake)

    def remarks(self) -> list[str]:
        """Say, in a line each, what is allowed and is hardly what was meant: keys without use, too few steps."""
        objective, steps = self.objective, len(self.plan.build().sigmas)
        keys = [f"objective.{name}" for name in choices_without_use(objective)]
        if objective.expert_loss != "matching":
            keys += [key for key in ("fake", "fake_updates", "draws_per_rollout") if key in self.model_fields_set]
        found = [f"not used with objective.expert_loss {objective.expert_loss}: {', '.join(keys)}"] if keys else []
        if objective.expert_loss == "denoising" and steps < MANY_STEPS:
            found.append(
                f"objective.expert_loss denoising: in the {steps} steps of this plan its experts are as blurred as the "
                "teacher in so many; experts of many, plan.steps=[40], can teach those of few (docs/training.md)"
            )
        return found

    def _component_of(self, phase: Phase, routing: TeacherRouting) -> str:
        chosen = self.generator.components or tuple({routing.component_at(sigma) for sigma in phase.sigmas})
        if len(chosen) > 1:
            networks = " or ".join(routing.components)
            if self.generator.components:
                raise ConfigError(f"generator.components: an expert stands on one network, found two: give {networks}")
            raise ConfigError(
                f"plan: phase {phase.name!r} runs at sigmas {phase.sigmas[0]:.4g} to {phase.sigmas[-1]:.4g}, on both "
                f"sides of the teacher's boundary {routing.boundary:.4g}: set generator.components to one of its "
                f"networks, [{networks}], or give the phases other sigmas"
            )
        return chosen[0]

    def groups(self, processes: int) -> int:
        """Among how many groups of processes the samples of an update are divided."""
        return processes // self.parallel.context_parallel

    def updates_of(self, phase: int) -> int:
        """Generator updates in this phase."""
        return self.updates[phase] if isinstance(self.updates, list) else self.updates


def with_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A configuration with overrides of the command line.

    Args:
        data: Keys and values; sections are mappings. It stays as it is.
        overrides: Texts ``key.inner=value``; leading dashes are fine. The value is YAML, but where it is text, a path
            or a word, which ``no``, ``2024-01-01`` and ``runs/x #1`` are not in YAML: there it is taken as it is. Text
            in quotes, and null, are YAML everywhere.

    Raises:
        ConfigError: A text is no override, or its key is called otherwise now.
    """
    values = {}
    for text in overrides:
        key, equals, value = text.lstrip("-").partition("=")
        if not equals or not key:
            raise ConfigError(f"an override is key.inner=value, found {text!r}; --help lists the keys")
        if key in MOVED:
            raise ConfigError(f"override {text!r}: {key} is {MOVED[key]} now")
        kind = kind_of(DistillConfig, key)
        is_null = takes_null(kind) and value in ("", "null", "~")
        if is_text(kind) and not is_null and not value.startswith(("'", '"')):
            values[key] = value
            continue
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"override {key!r}: {value!r} is not a YAML value{in_quotes(value)}") from None
    return with_values(data, values)


def with_values(data: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with other values.

    Args:
        data: Keys and values; sections are mappings. It stays as it is.
        values: New values by dotted key.

    Raises:
        ConfigError: A part of a key holds a value, not a section.
    """
    merged: dict[str, Any] = json.loads(json.dumps(data, default=str))  # a YAML anchor shares what must be separate
    for key, value in values.items():
        *parents, last = key.split(".")
        place = merged
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"override {key!r}: {parent!r} holds a value, not a section")
        place[last] = value
    return merged


def read_settings(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file, unchecked.

    Raises:
        ConfigError: There is no such file, or it is no mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config; training/configs/ has examples") from None
    except OSError as error:
        raise ConfigError(f"{path}: not a file that can be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        hint = in_quotes(": ") if "mapping values" in text else ""
        raise ConfigError(f"{path}: not YAML: {text}{hint}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, found {type(data).__name__}")
    return data


def load_config(path: Path, overrides: Sequence[str] = ()) -> DistillConfig:
    """Read a YAML file, apply overrides, check everything.

    Args:
        path: The file.
        overrides: Texts ``key.inner=value``.

    Raises:
        ConfigError: The file or a value cannot be; one line for each problem.
    """
    return parse_config(with_overrides(read_settings(path), overrides), str(path))


def parse_config(data: Mapping[str, Any], source: str) -> DistillConfig:
    """Check a configuration given as plain data.

    Args:
        data: Keys and values; sections are mappings.
        source: Where they are from; every line of an error starts with it.

    Raises:
        ConfigError: A key or a value cannot be; one line for each problem.
    """
    if moved := moved_keys(data):
        raise ConfigError("\n".join(f"{source}: {line}" for line in moved))
    try:
        config = DistillConfig.model_validate(dict(data))
    except PhasePlanError as error:
        raise ConfigError(f"{source}: plan: {error}") from None
    except ValidationError as error:
        raise ConfigError(
            "\n".join(
                f"{source}: {line}"
                for line in lines_of(error.errors(), [key for key, _, _ in fields_of(DistillConfig)])
            )
        ) from None
    understood = leaves_of(config.model_dump())
    for key, value in leaves_of(data).items():  # pydantic takes true for 1
        if isinstance(value, bool) and not isinstance(understood.get(key), bool):
            raise ConfigError(f"{source}: {key}: expected a number, found {value!r}")
    return config


def with_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as plain data under today's keys.

    Args:
        data: That of a run of today or of an older one.

    Returns:
        All of today's keys and their values; those of ``data`` alone where it is not valid today.
    """
    renamed = with_todays_keys(data)
    try:
        return json.loads(DistillConfig.model_validate(renamed).model_dump_json())
    except (ValidationError, PhasePlanError):
        return renamed

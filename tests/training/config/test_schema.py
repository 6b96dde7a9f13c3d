"""Configurations: what is accepted, what is refused and in which words."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdmd_core.families import TeacherRouting
from pdmd_core.method import Objective
from pdmd_core.roles import FAKE, RoleSpec
from tests.helpers.configs import changed
from training.config.keys import fields_of
from training.config.problems import leaves_of
from training.config.schema import (
    ConfigError,
    DistillConfig,
    load_config,
    parse_config,
    with_defaults,
    with_overrides,
)
from training.data.buckets import Bucket
from training.data.examples import ExampleSource

CONFIGS = sorted((Path(__file__).parents[3] / "training" / "configs").glob("*.yaml"))


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path: Path) -> None:
    assert load_config(path).plan.build().sigmas[0] == 1


def test_the_four_methods_are_configs_of_one_code_path() -> None:
    plans = {path.stem: load_config(path).plan.build() for path in CONFIGS}
    shapes = {name: [len(phase.sigmas) for phase in plan.phases] for name, plan in plans.items()}
    assert shapes["embedded_dmd_one_step"] == [1]
    assert shapes["embedded_dmd_sgts"] == [4]
    assert shapes["embedded_phased_4x1"] == [1, 1, 1, 1]
    assert shapes["embedded_phased"] == [2, 2]


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("batchsize", "did you mean 'batch_size'?"),
        ("objective.guidance", "did you mean 'objective.guidance_scale'?"),
        ("batch-size", "did you mean 'batch_size'?"),
        ("genrator.lr", "did you mean 'generator.lr'?"),
        ("checkpoint.evry", "did you mean 'checkpoints.every'?"),
        ("genrator", "did you mean 'generator'?"),
        ("lr", "did you mean 'generator.lr' or 'fake.lr'?"),
        ("memory.sharding", "did you mean 'parallel.sharding'?"),
        ("genrator.what", "expected in generator: kind, rank, alpha, targets, components, optimizer, lr, "),
        ("generator.lr_of_it_all", "expected in generator: kind, rank, "),
        ("what.ever", "expected: model, data, plan, objective, generator, fake, start, "),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(
    settings_of_run: dict[str, Any], key: str, suggestion: str
) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(with_overrides(settings_of_run, [f"{key}=1"]), "file.yaml")
    text = one_line(error)
    assert text.startswith(f"file.yaml: unknown key {key!r}, {suggestion}")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batch_size=0", ["batch_size", "greater than or equal to 1"]),
        ("plan.sigmas=[[1.0, 0.5]]", ["either steps", "sigmas"]),
        ("plan={sigmas: [[1.0, 0.5], [0.6]]}", ["sigmas must descend"]),
        ("plan={sigmas: [[875.0]]}", ["(0, 1]", "875"]),
        ("plan.names=[fake_2, low]", ["plan.names: expected names of experts", "'fake_2'"]),
        ("objective.expert_rollouts=through", ["objective.expert_rollouts: expected truncated", "found through"]),
        ("updates=[1, 2, 3]", ["3 numbers for 2 phases"]),
        ("updates=0", ["updates"]),
        ("objective.fake_target=bias", ["fake_target", "'unbiased' or 'biased'"]),
        ("generator.kind=lorra", ["generator.kind", "'lora' or 'full'"]),
        ("updates=many", ["updates: ", "a valid integer or a valid list", "'many'"]),
        ("generator.rank=true", ["generator.rank: expected a number, found True"]),
        ("validation.seeds=yes", ["validation.seeds: expected a number, found True"]),
        ("generator=null", ["generator: expected a section with keys, found None"]),
        ("generator.targets=to_q", ["generator.targets: ", "list", "'to_q'"]),
        ("data.buckets=column", ["data.buckets: ", "'columns'", "'column'"]),
        ("data.buckets=[]", ["data.buckets: expected at least one size"]),
        ("data.buckets=[{width: 8}]", ["data.buckets[0].height is required"]),
        (
            "data.buckets=[{width: 8, height: 0}]",
            ["data.buckets[0].height: expected a whole number at least 1"],
        ),
        ("validation.prompts=[a: b]", ["a valid string", "text with ': ' stands in quotes"]),
        ("generator.betas=[0.9, 1.0]", ["generator.betas: expected a finite number at least 0 and below 1, found 1.0"]),
        ("generator.lr=.inf", ["generator.lr: expected a finite number above 0, found inf"]),
        ("seed=-1", ["seed: ", "greater than or equal to 0"]),
        ("seed=9223372036854775808", ["seed: ", "less than"]),
        ("monitoring.tracker=wand", ["monitoring.tracker: ", "'wandb'", "found 'wand'"]),
        ("checkpoints.patience=2", ["checkpoints.patience: by which measure", "checkpoints.best"]),
        ("checkpoints.best=frechet", ["checkpoints.best: frechet is measured with validation.features"]),
        ("checkpoints.best=teacher_distance", ["checkpoints.best: measured every None updates"]),
        ("data.buckets=[{width: 8, hight: 8, height: 8}]", ["'data.buckets[0].hight'", "'data.buckets[].height'"]),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_key(
    settings_of_run: dict[str, Any], override: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(with_overrides(settings_of_run, [override]), "file.yaml")
    text = one_line(error)
    assert text.startswith("file.yaml: ")
    assert all(word in text for word in words), text


def test_sections_are_what_the_library_and_the_data_take(config: DistillConfig) -> None:
    assert type(config.objective) is Objective
    assert isinstance(config.generator, RoleSpec) and isinstance(config.data, ExampleSource)
    assert [example.prompt for example in config.data] == ["a panda", "a fox", "an apple"]
    sized = changed(config, **{"data.buckets": [{"width": 32, "height": 16}]})
    assert sized.data.buckets == [Bucket(32, 16)] and sized.data.sizes and not config.data.sizes


def test_overrides_are_dotted_and_typed_and_leave_the_source_alone(settings_of_run: dict[str, Any]) -> None:
    merged = with_overrides(settings_of_run, ["generator.lr=2e-4", "--plan.steps=[1,1,1]", "ema_decay=null"])
    config = parse_config(merged, "test")
    assert config.generator.lr == 2e-4
    assert config.plan.steps == [1, 1, 1]
    assert config.ema_decay is None
    assert settings_of_run["generator"]["lr"] == 1e-2


@pytest.mark.parametrize("override", ["batch_size", "=3", "batch_size.inner=3", "updates=[unclosed"])
def test_a_malformed_override_says_what_an_override_is(settings_of_run: dict[str, Any], override: str) -> None:
    with pytest.raises(ConfigError) as error:
        with_overrides(settings_of_run, [override])
    assert "override" in one_line(error)


@pytest.mark.parametrize(
    ("content", "words"),
    [("[1, 2]", "mapping"), ("a: [", "not YAML"), (b"\xff\xfe", "not YAML"), (None, "no such config")],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path: Path, content: str | bytes | None, words: str) -> None:
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert words in one_line(error)
    assert str(path) in str(error.value)


def test_a_config_survives_the_file_that_a_run_writes(config: DistillConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    assert load_config(path) == config


def leaves(config: DistillConfig) -> set[str]:
    return set(leaves_of(config.model_dump(mode="json")))


def test_every_key_has_a_default_and_a_description(config: DistillConfig) -> None:
    fields = {name: (default, description) for name, default, description in fields_of(DistillConfig)}
    assert leaves(config) == {name for name in fields if "[]" not in name}
    assert all(default and description for default, description in fields.values() if default != "")
    assert fields["generator.rank"] == ("64", "LoRA rank."), "from the class that it extends"
    assert fields["fake.lr"] == ("5e-05", "Learning rate.")
    assert fields["objective.fake_target"][0] == "unbiased of unbiased|biased"
    assert fields["data.prompts"][0] == "required" and fields["data.buckets[].frames"][0] == "1"


TWO = TeacherRouting(("transformer", "transformer_2"), 0.875)


@pytest.mark.parametrize(
    ("plan", "experts"),
    [
        ({"steps": [2, 2], "shift": 5.0}, "12"),
        ({"steps": [1, 1, 1, 1], "shift": 5.0}, "1122"),
        ({"sigmas": [[1.0, 0.9], [0.875], [0.874]]}, "112"),
        ({"sigmas": [[1.0]]}, "1"),
    ],
)
def test_experts_stand_on_the_network_of_their_sigmas_and_the_fake_on_all(
    settings_of_run: dict[str, Any], plan: dict[str, Any], experts: str
) -> None:
    config = parse_config(settings_of_run | {"plan": plan}, "test")
    names = {"1": "transformer", "2": "transformer_2"}
    specs = config.role_specs(TWO)
    assert [specs[phase.name].components for phase in config.plan.build().phases] == [(names[e],) for e in experts]
    assert specs[FAKE].components == ("transformer", "transformer_2")
    assert {spec.components for spec in config.role_specs(TeacherRouting()).values()} == {("transformer",)}


def test_a_configuration_written_before_a_key_existed_is_the_one_with_its_default(config: DistillConfig) -> None:
    now = config.model_dump(mode="json")
    before = copy.deepcopy(now)
    for section, key in (("model", "pipeline"), ("model", "architecture"), ("generator", "components")):
        del before[section][key]
    assert with_defaults(before) == now
    assert with_defaults({"nonsense": 1}) == {"nonsense": 1}


def test_a_negative_prompt_with_a_colon_is_taken_or_said_how(settings_of_run: dict[str, Any], tmp_path: Path) -> None:
    overridden = parse_config(with_overrides(settings_of_run, ["data.negative_prompt=a: b"]), "test")
    assert overridden.data.negative_prompt == "a: b"
    path = tmp_path / "config.yaml"
    path.write_text("data:\n  negative_prompt: a: b\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"not YAML: .*\(text with ': ' stands in quotes, as in 'a: b'\)$"):
        load_config(path)

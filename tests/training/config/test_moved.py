"""Keys of older configurations: named in files and on the command line, renamed in checkpoints and run folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.configs import changed
from tests.helpers.interrupted import run_and_stop
from training.config.changes import changes_since
from training.config.keys import fields_of
from training.config.schema import ConfigError, DistillConfig, load_config, with_defaults, with_overrides, with_values
from training.loop.build import build_run
from training.loop.checkpoints import VALUES, list_checkpoints
from training.loop.digests import write_digests
from training.loop.resumption import Resume
from training.loop.trainer import Trainer
from training.monitoring.page import write_page

BEFORE = {
    "prompts": "words.txt",
    "negative_prompt": "blurry",
    "cache_dir": "kept",
    "generator.component": "transformer",
    "sharding": "none",
    "shard_size": None,
    "context_parallel": 1,
    "micro_batch_size": 2,
    "gradient_checkpointing": True,
    "guidance_batched": False,
    "offload_idle_network": False,
    "offload_idle_experts": True,
    "checkpoint_every": 7,
    "keep_checkpoints": 8,
    "sample_every": None,
    "sample_prompts": ["a fox"],
    "sample_seeds": 3,
    "tracker": None,
    "log_every": 9,
    "watch.page": False,
    "watch.window": 5,
    "watch.diversity_fall": 0.5,
    "watch.saturation_rise": 2.0,
    "watch.fake_loss_rise": 3.0,
    "watch.grad_norm_rise": 4.0,
    "watch.smallest_motion": 0.1,
    "watch.share_of_time": 0.2,
    "expert_dtype": "bfloat16",
}
"""Every key that had another name, with a value."""
NOW = {
    "data": {"prompts": "words.txt", "negative_prompt": "blurry", "cache_dir": "kept"},
    "generator": {"components": ["transformer"]},
    "parallel": {"sharding": "none", "shard_size": None, "context_parallel": 1},
    "memory": {
        "micro_batch_size": 2,
        "gradient_checkpointing": True,
        "guidance_batched": False,
        "offload_idle_network": False,
        "offload_idle_experts": True,
    },
    "checkpoints": {"every": 7, "keep": 8},
    "validation": {"every": None, "prompts": ["a fox"], "seeds": 3},
    "monitoring": {
        "tracker": None,
        "log_every": 9,
        "page": False,
        "window": 5,
        "diversity_fall": 0.5,
        "saturation_rise": 2.0,
        "fake_loss_rise": 3.0,
        "grad_norm_rise": 4.0,
        "smallest_drift": 0.1,
        "share_of_time": 0.2,
    },
    "export": {"dtype": "bfloat16"},
}
"""The same under today's names."""


def under_old_names(config: dict[str, Any]) -> dict[str, Any]:
    """What an older program would have written of this run."""
    old = {key: value for key, value in config.items() if key not in ("parallel", "memory", "checkpoints", "export")}
    del old["validation"], old["monitoring"], old["fake"]["components"]
    old["prompts"], old["negative_prompt"], old["cache_dir"] = (
        old["data"].pop(key) for key in ("prompts", "negative_prompt", "cache_dir")
    )
    components = old["generator"].pop("components")
    old["generator"]["component"] = components and components[0]
    old |= {key: config[section][key] for section in ("parallel", "memory") for key in NOW[section]}
    old |= {"checkpoint_every": config["checkpoints"]["every"], "keep_checkpoints": config["checkpoints"]["keep"]}
    old |= {f"sample_{key}": config["validation"][key] for key in ("every", "prompts", "seeds")}
    watch = dict(config["monitoring"])
    watch["smallest_motion"] = watch.pop("smallest_drift")
    old |= {"tracker": watch.pop("tracker"), "log_every": watch.pop("log_every"), "watch": watch}
    return old | {"expert_dtype": config["export"]["dtype"]}


@pytest.mark.parametrize("old", BEFORE)
def test_every_old_key_is_one_line_that_names_the_new_one(
    settings_of_run: dict[str, Any], tmp_path: Path, old: str
) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(with_values(settings_of_run, {old: BEFORE[old]})), encoding="utf-8")
    with pytest.raises(ConfigError) as in_file:
        load_config(path)
    with pytest.raises(ConfigError) as on_command_line:
        with_overrides(settings_of_run, [f"--{old}=null"])
    (line,) = str(in_file.value).splitlines()
    start, new, end = line.removeprefix(f"{path}: ").rpartition(" is ")[0], *line.split(" ")[-2:]
    assert start == old and end == "now"
    assert new in {name for name, _, _ in fields_of(DistillConfig)}
    assert str(on_command_line.value) == f"override '--{old}=null': {old} is {new} now"


def test_a_section_of_old_keys_is_named_key_by_key(settings_of_run: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    for watch, lines in (
        ({"page": False, "window": 9}, ["watch.page is monitoring.page now", "watch.window is monitoring.window now"]),
        ({"pge": False}, ["watch is monitoring now"]),
    ):
        path.write_text(yaml.safe_dump({**settings_of_run, "watch": watch}), encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert str(caught.value).splitlines() == [f"{path}: {line}" for line in lines]


def test_a_configuration_under_old_names_becomes_that_of_today(settings_of_run: dict[str, Any]) -> None:
    del settings_of_run["data"], settings_of_run["checkpoints"]
    del settings_of_run["validation"], settings_of_run["monitoring"]
    settings_of_run["generator"] = settings_of_run["fake"] = {}
    before = with_values(settings_of_run, BEFORE)
    assert with_defaults(before) == with_defaults({**settings_of_run, **NOW})
    found = changed(settings_of_run | NOW).model_dump(mode="json")
    assert with_defaults(before) == found
    assert with_defaults(under_old_names(with_defaults(before))) == found


def test_a_run_with_a_checkpoint_under_old_names_goes_on(config: DistillConfig) -> None:
    run_and_stop(Trainer(build_run(config)), after=3)
    checkpoint = list_checkpoints(config.output_dir / "checkpoints")[-1]
    content = json.loads((checkpoint / VALUES).read_text(encoding="utf-8"))
    old = content["values"]["config"] = under_old_names(content["values"]["config"])
    assert "checkpoints" not in old and old["keep_checkpoints"] == 2
    (checkpoint / VALUES).write_text(json.dumps(content), encoding="utf-8")
    write_digests(checkpoint)
    with pytest.raises(ConfigError, match=r"Changed: generator\.lr: 0\.01 -> 0\.5$"):
        Trainer(build_run(changed(config, **{"generator.lr": 0.5}), Resume())).run()
    Trainer(build_run(changed(config, **{"checkpoints.keep": 1}), Resume())).run()
    lines = (config.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["update"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_the_page_of_a_run_under_old_names_is_written(config: DistillConfig) -> None:
    config.output_dir.mkdir()
    old = under_old_names(changed(config, **{"validation.prompts": ["a fox"]}).model_dump(mode="json"))
    (config.output_dir / "config.yaml").write_text(yaml.safe_dump(old), encoding="utf-8")
    assert "0 of 6 updates." in write_page(config.output_dir).read_text(encoding="utf-8")


def test_a_key_that_is_gone_is_no_change_at_the_value_that_is_left(config: DistillConfig) -> None:
    before = json.loads(config.model_dump_json())
    before["objective"]["expert_start"] = "teacher"
    assert not changes_since(before, config, ()).free
    before["objective"]["expert_start"] = "previous"
    with pytest.raises(ConfigError, match=r"objective\.expert_start: 'previous' -> None"):
        changes_since(before, config, ())

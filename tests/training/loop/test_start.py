"""Runs that start from experts, or from a LoRA file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdmd_core.experts import ExpertsError, PhasedExperts
from tests.helpers.configs import changed
from tests.helpers.interrupted import run_and_stop
from training.config.command_line import UserError
from training.config.schema import ConfigError, DistillConfig
from training.loop.build import build_run
from training.loop.export_checkpoint import export_checkpoint
from training.loop.resumption import Resume
from training.loop.trainer import Trainer

SMALL = {"updates": 2, "batch_size": 2, "fake_updates": 1, "plan.steps": [1, 1]}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> DistillConfig:
    """A finished run of LoRA experts of rank 4."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "prompts.txt").write_text("a panda\na fox\n", encoding="utf-8")
    role = {"kind": "lora", "rank": 4, "alpha": 4, "lr": 1e-2}
    settings: dict[str, Any] = {
        "model": {"path": str(teacher), "height": 16, "width": 16, "max_sequence_length": 12},
        "data": {"prompts": str(folder / "prompts.txt")},
        "plan": {"steps": [1, 1], "shift": 3.0},
        "generator": role,
        "fake": role,
        "output_dir": str(folder / "run"),
        "validation": {"seeds": 1},
        "monitoring": {"tracker": None, "page": False},
    }
    config = changed(settings, **{key: value for key, value in SMALL.items() if key != "plan.steps"})
    Trainer(build_run(config)).run()
    return config


def started(first: DistillConfig, folder: Path, **values: Any) -> DistillConfig:
    start = {"start.experts": str(first.output_dir / "experts"), "output_dir": str(folder / "run")}
    return changed(first, **{**start, **values})


def product(roles: Any, name: str) -> dict[str, torch.Tensor]:
    """What a LoRA role adds to each module."""
    state, spec = roles.state_dict(name), roles.specs[name]
    modules = [key.removesuffix(".lora_A") for key in state if key.endswith(".lora_A")]
    return {m: spec.alpha / spec.rank * (state[f"{m}.lora_B"] @ state[f"{m}.lora_A"]) for m in modules}


def of_file(first: DistillConfig, name: str) -> dict[str, torch.Tensor]:
    state = PhasedExperts.open(first.output_dir / "experts").lora_state(name)  # alpha is the rank
    modules = [key.removesuffix(".lora_A") for key in state if key.endswith(".lora_A")]
    return {m: state[f"{m}.lora_B"] @ state[f"{m}.lora_A"] for m in modules}


def test_a_phase_is_trained_alone_on_given_experts(first: DistillConfig, tmp_path: Path) -> None:
    """The earlier expert has its own rank and does not move; a stopped run goes on; checkpoints are exported."""
    alone = started(first, tmp_path, **{"start.phase": "low_noise", "generator.rank": 2, "checkpoints.every": 1})
    trainer = Trainer(build_run(alone))
    run_and_stop(trainer, 1)
    run = Trainer(build_run(alone, Resume()))
    assert run.built.resumption
    experts = PhasedExperts.open(run.run())
    high = [load_file(config.output_dir / "experts" / "high_noise.safetensors") for config in (first, alone)]
    assert all(torch.equal(high[0][key], high[1][key]) for key in high[0])
    assert [expert.rank for expert in experts.manifest.experts] == [4, 2]
    assert experts.manifest.training["updates"] == [0, 2]
    own = PhasedExperts.open(first.output_dir / "experts").manifest.experts[0]
    assert experts.manifest.training["start"] == {"high_noise": {"sha256": own.sha256}}
    exported = load_file(export_checkpoint(alone.output_dir, 2) / "low_noise.safetensors")
    assert all(torch.equal(value, exported[key]) for key, value in load_file(experts.path("low_noise")).items())
    assert not (alone.output_dir / "experts-high_noise").exists()
    whole = Trainer(build_run(changed(alone, output_dir=str(tmp_path / "whole"))))
    whole.run()
    (low,) = [load_file(tmp_path / "whole" / "experts" / "low_noise.safetensors")]
    assert all(torch.equal(low[key], exported[key]) for key in low), "stopped or not"


def test_a_warm_start_keeps_what_a_rank_can_hold_and_states_the_rest(
    first: DistillConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = of_file(first, "low_noise")
    for rank, alpha in ((4, 4), (6, 3), (2, 2)):
        ranks = {"generator.rank": rank, "generator.alpha": alpha}
        run = build_run(started(first, tmp_path, **{"start.warm": True, **ranks}))
        found, state = product(run.roles, "low_noise"), run.roles.state_dict("low_noise")
        errors = []
        for module, value in expected.items():
            if rank < 4:
                s = torch.linalg.svdvals(value)
                errors.append(float(s[rank:].norm() / s.norm()))
                assert (found[module] - value).norm() / value.norm() == pytest.approx(errors[-1], abs=1e-4)
            else:
                torch.testing.assert_close(found[module], value, atol=1e-6, rtol=1e-4)
            assert bool((state[f"{module}.lora_A"].norm(dim=1) > 0).all()), "further ranks can learn"
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("low_noise begins from")]
        if errors:
            assert run.start["low_noise"]["relative_error_mean"] == pytest.approx(sum(errors) / len(errors), abs=1e-4)
            assert "relative error " in said[0] and max(errors) > 0.01
        else:
            assert said[0].endswith(": exactly")


def test_between_lora_and_full(first: DistillConfig, tmp_path: Path) -> None:
    full = {"generator": {"kind": "full", "lr": 1e-3}, "start.warm": True}
    config = started(first, tmp_path, **full)
    trainer = Trainer(build_run(config))
    base, expected = trainer.roles.base_state_dict(), of_file(first, "low_noise")
    for module, value in expected.items():
        own = trainer.roles.state_dict("low_noise")[f"{module}.weight"]
        torch.testing.assert_close(own - base[f"{module}.weight"], value, atol=1e-6, rtol=1e-3)
    trainer.progress.phase = 1
    folder = config.output_dir / "experts"
    trainer.output_dir.mkdir(parents=True, exist_ok=True)
    trainer.start_phase()
    trainer.finish_phase()
    back = {"start.experts": str(folder), "start.warm": True, "generator.rank": 4, "output_dir": str(tmp_path / "back")}
    found = product(build_run(changed(first, **back)).roles, "low_noise")
    for module, value in expected.items():
        torch.testing.assert_close(found[module], value, atol=1e-5, rtol=1e-2)


def test_a_lora_file_is_a_start(first: DistillConfig, tmp_path: Path) -> None:
    """A file without our manifest, of native names and alpha, as other projects release them."""
    tensors = load_file(first.output_dir / "experts" / "low_noise.safetensors")
    path = tmp_path / "released.safetensors"
    save_file({key: value * 2 if key.endswith("alpha") else value for key, value in tensors.items()}, path)
    run = build_run(started(first, tmp_path, **{"start.experts": str(path), "start.warm": True, "generator.rank": 6}))
    for name in ("high_noise", "low_noise"):
        found = product(run.roles, name)
        for module, value in of_file(first, "low_noise").items():
            torch.testing.assert_close(found[module], 2 * value, atol=1e-6, rtol=1e-4)
    with pytest.raises(ConfigError, match="a LoRA file is no experts of high_noise"):
        build_run(changed(run.config, **{"start.phase": "low_noise"}))
    with pytest.raises(UserError, match=r"^generator\.targets: high_noise has no LoRA on .*, which it begins"):
        build_run(changed(run.config, **{"generator.targets": ["attn1.to_q"]}))


def test_what_does_not_fit_is_one_line_before_anything_is_loaded(first: DistillConfig, tmp_path: Path) -> None:
    late = {"start.phase": "low_noise"}
    for values, words in (
        ({"start.experts": None, **late}, "start.experts: expected an experts folder for start.phase"),
        ({}, "nothing is taken from it: set start.warm to true"),
        ({"start.phase": "lower"}, "start.phase: expected one of high_noise, low_noise, found 'lower'"),
        (
            {**late, "plan": {"sigmas": [[1.0, 0.9], [0.5]]}},
            "'high_noise' was trained on sigmas 1, the plan here has 1, 0.9",
        ),
        ({**late, "plan.names": ["first", "low_noise"]}, "has no expert 'first', which phase 'low_noise' comes after"),
    ):
        with pytest.raises(UserError, match=words) as error:
            build_run(started(first, tmp_path, **values))
        assert "\n" not in str(error.value)
    shutil.copytree(first.output_dir / "experts", tmp_path / "experts")
    file = tmp_path / "experts" / "high_noise.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(ExpertsError, match="high_noise"):
        build_run(started(first, tmp_path, **{**late, "start.experts": str(tmp_path / "experts")}))

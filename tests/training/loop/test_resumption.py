"""Runs that are changed, extended, taken back or moved, and go on."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from pdmd_core.experts import read_manifest
from tests.helpers.configs import changed
from training.config.schema import ConfigError, DistillConfig
from training.loop import build
from training.loop.build import build_run
from training.loop.checkpoints import CheckpointError, list_checkpoints, load_values, update_of
from training.loop.resumption import Resume
from training.loop.trainer import Trainer

EXPERTS = ("high_noise", "low_noise")


@pytest.fixture
def small(config: DistillConfig) -> DistillConfig:
    """Two phases of two updates, without decay."""
    return changed(config, updates=2, batch_size=2, fake_updates=1, lr_decay_share=0.0, **{"plan.steps": [1, 1]})


def updates_kept(config: DistillConfig) -> list[int]:
    return [update_of(path) for path in list_checkpoints(config.output_dir / "checkpoints")]


def experts(config: DistillConfig) -> dict[str, torch.Tensor]:
    files = {name: load_file(config.output_dir / "experts" / f"{name}.safetensors") for name in EXPERTS}
    return {f"{name}/{key}": value for name, tensors in files.items() for key, value in tensors.items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_an_extended_run_is_the_one_that_was_planned_so(small: DistillConfig, tmp_path: Path) -> None:
    """Also one that goes back to the end of its first phase, whose checkpoint stays for good, to extend that."""
    planned = changed(small, updates=[2, 4], output_dir=str(tmp_path / "planned"))
    Trainer(build_run(planned)).run()
    Trainer(build_run(changed(small, **{"checkpoints.keep": 1}))).run()
    assert updates_kept(small) == [2, 4], "the newest, and the ends of phases"
    longer = changed(small, updates=[2, 4])
    with pytest.raises(ConfigError, match=r"allow it with --allow-change updates, .* Changed: updates: 2 -> \[2, 4\]$"):
        build_run(longer, Resume())
    Trainer(build_run(longer, Resume(["updates"]))).run()
    assert equal(experts(longer), experts(planned))
    summary = read_manifest(longer.output_dir / "experts").training
    assert summary["updates"] == [2, 4] and summary["changes"] == ["after update 4: updates: 2 -> [2, 4]"]
    assert "updates: 2 -> [2, 4]" in (longer.output_dir / "experts" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match=r"phase 'high_noise' is done with 2, 3 are asked .*--from-checkpoint 2,"):
        build_run(changed(small, updates=[3, 4]), Resume(["updates"]))
    with pytest.raises(ConfigError, match=r"updates: 4 of phase 'low_noise' are done, 3 are asked for"):
        build_run(changed(small, updates=[2, 3]), Resume(["updates"]))

    other = changed(small, updates=[3, 1], output_dir=str(tmp_path / "other"))
    Trainer(build_run(other)).run()
    trainer = Trainer(build_run(changed(small, updates=[3, 1]), Resume(["updates"], update=2)))
    trainer.run()
    assert equal(experts(small), experts(other))
    aside = {path.name for path in (small.output_dir / "checkpoints").glob("aside-*")}
    assert aside == {"aside-0-update-00000005", "aside-0-update-00000006"}
    assert trainer.built.history[-2:] == [
        "after update 2: back from update-00000006",
        "after update 2: updates: 2 -> [3, 1]",
    ]


def test_a_configuration_is_compared_before_anything_is_loaded(small: DistillConfig) -> None:
    Trainer(build_run(small)).run()
    changes = changed(small, **{"generator.lr": 0.0005})
    with mock.patch.object(build, "load_image_side", side_effect=AssertionError("loaded")):
        with pytest.raises(ConfigError, match=r"generator\.lr: 0\.01 -> 0\.0005"):
            build_run(changes, Resume())
        with pytest.raises(CheckpointError, match=r"no checkpoint of update 7; there are those of: 2, 3, 4"):
            build_run(small, Resume(update=7))
    trainer = Trainer(build_run(changes, Resume(["generator.lr"], update=3)))
    with mock.patch.object(trainer, "finish_phase"):
        trainer.run()
    assert trainer.training.optimizers["low_noise"].param_groups[0]["lr"] == pytest.approx(0.0005)
    newest = list_checkpoints(small.output_dir / "checkpoints")[-1]
    history = ["after update 3: back from update-00000004", "after update 3: generator.lr: 0.01 -> 0.0005"]
    assert load_values(newest)["history"] == history
    assert build_run(changes, Resume(["generator.lr"])).history == history, "said once, when it happened"


def test_a_teacher_and_prompts_that_moved_are_the_same_and_others_are_not(small: DistillConfig, tmp_path: Path) -> None:
    Trainer(build_run(small)).run()
    shutil.copytree(small.model.path, tmp_path / "moved")
    shutil.copy(small.data.prompts, tmp_path / "moved.txt")
    moved = changed(small, **{"model.path": str(tmp_path / "moved"), "data.prompts": str(tmp_path / "moved.txt")})
    run = build_run(moved, Resume())
    assert run.resumption and {text.partition(":")[0] for text in run.resumption.changed} == {
        "data.prompts",
        "model.path",
    }
    (weights,) = (tmp_path / "moved" / "transformer").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ConfigError, match=r"model\.path: the weights of .*moved are not those of the run's teacher"):
        build_run(moved, Resume())
    (tmp_path / "moved.txt").write_text("a pear\n", encoding="utf-8")
    with (
        mock.patch("training.data.prompt_cache._write", side_effect=AssertionError("encoded")),
        pytest.raises(ConfigError, match="changed since the checkpoint"),
    ):
        build_run(changed(moved, **{"model.path": small.model.path}), Resume())


def test_every_nth_checkpoint_stays(small: DistillConfig) -> None:
    run = changed(small, updates=[5, 1], **{"checkpoints.keep": 1, "checkpoints.keep_every": 2})
    Trainer(build_run(run)).run()
    assert updates_kept(run) == [2, 4, 5, 6]
    with pytest.raises(
        ConfigError, match=r"checkpoints\.keep_every: expected a multiple of checkpoints\.every, 2, found 3"
    ):
        changed(run, **{"checkpoints.every": 2, "checkpoints.keep_every": 3})


def test_a_validation_that_fails_ends_nothing_and_comes_after_its_checkpoint(
    small: DistillConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = changed(small, **{"validation.every": 2, "validation.teacher_steps": None, "validation.decode": "whole"})
    trainer = Trainer(build_run(run))
    there: list[list[int]] = []

    def fails(*arguments: object) -> torch.Tensor:
        there.append(updates_kept(run))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried 8 GiB")

    with mock.patch.object(trainer.built.family, "decode", fails):
        folder = trainer.run()
    assert (folder / "phased_experts.json").is_file()
    assert there == [[], [1, 2], [1, 2], [2, 3, 4], [2, 3, 4]], (
        "before the first update, after it, at the ends of phases"
    )
    said = [line for line in capsys.readouterr().err.splitlines() if "validation" in line]
    assert len(said) == 5 and said[0].endswith(
        "validation update-000000 failed, the run goes on: OutOfMemoryError: CUDA out of memory. Tried 8 GiB"
    )

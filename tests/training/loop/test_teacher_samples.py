"""The teacher's samples beside validations: what they are, where they are kept, and what fails."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

from pdmd_core.phases import PhasePlan
from tests.helpers.configs import changed
from training.config.schema import DistillConfig
from training.data.buckets import SampleSize
from training.evaluation.sampler import Sampler
from training.loop import teacher_samples as module
from training.loop.build import build_run
from training.loop.teacher_samples import SharedEvaluationFailed, teacher_samples
from training.loop.trainer import Trainer
from training.loop.validation import starting_points
from training.monitoring.jsonl import monitoring_log


def test_they_are_what_the_teacher_samples_from_the_same_noise(config: DistillConfig, tmp_path: Path) -> None:
    run = build_run(changed(config, **{"validation.teacher_steps": 6}))
    found = teacher_samples(run, run.data.validation)
    assert list(found) == ["high_noise", "low_noise"]
    indices, noise = starting_points(run, run.data.validation)
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1]), "seeds side by side"
    prompts = ["a panda", "a fox", "an apple"]
    sampler = Sampler(config.model.path, SampleSize(16, 16, 1, 12), prompts, tmp_path, device="cpu")
    boundary = run.plan.boundaries[0]
    with mock.patch.object(sampler, "noise", lambda seeds: noise[: len(seeds)]):
        plan = PhasePlan.from_sigmas([sorted({*PhasePlan.from_steps([6], 3.0).sigmas, boundary}, reverse=True)])
        with mock.patch("training.evaluation.sampler.PhasePlan.from_steps", lambda *steps: plan):
            pairs = [(int(index), 0) for index in indices]
            expected = sampler.with_teacher(pairs, 6, 3.0, config.objective.guidance_scale)
    torch.testing.assert_close(found["low_noise"], expected)
    assert not torch.allclose(found["high_noise"], found["low_noise"])


def test_they_are_made_once_and_again_when_damaged(config: DistillConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run = build_run(config)
    first = teacher_samples(run, run.data.validation)
    with mock.patch.object(module, "_sample", side_effect=AssertionError("sampled")):
        again = teacher_samples(run, run.data.validation)
    assert all(torch.equal(first[name], again[name]) for name in first)
    (path,) = (config.output_dir / "cache").glob("teacher-*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    mended = teacher_samples(run, run.data.validation)
    assert "is damaged (not what was written): the teacher samples again" in capsys.readouterr().err
    assert all(torch.equal(first[name], mended[name]) for name in first)
    other = build_run(changed(config, **{"objective.guidance_scale": 3.0}))
    assert not torch.equal(teacher_samples(other, other.data.validation)["low_noise"], first["low_noise"])


def test_they_stand_beside_every_validation(config: DistillConfig) -> None:
    run = changed(config, updates=1, **{"validation.every": 1, "validation.features": "efflite0", "model.height": 32})
    with mock.patch("training.monitoring.feature_statistics.load_space", lambda *rest: _means):
        Trainer(build_run(run)).run()
    lines = monitoring_log(run.output_dir, "validations").read()
    assert all(line["teacher_distance"] > 0 and line["frechet"] > 0 < line["feature_diversity"] for line in lines)
    for phase in ("high_noise", "low_noise"):
        with Image.open(run.output_dir / "watch" / "teacher" / f"{phase}.webp") as picture:
            assert picture.size == (34, 3 * 32 + 4)
    page = (run.output_dir / "report.html").read_text(encoding="utf-8")
    assert page.count("the teacher, from the end of") == 2 and "Frechet distance" in page


def _means(pixels: object) -> dict[str, torch.Tensor]:
    return {"features": pixels.all.flatten(2).mean(2).flatten(1).repeat(1, 2) + torch.rand(len(pixels.all), 2)}  # type: ignore[attr-defined]


def test_what_fails_is_a_warning_but_where_others_wait(
    config: DistillConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(build_run(changed(config, updates=1)))
    with mock.patch.object(module, "_walk", side_effect=torch.OutOfMemoryError("Tried 8 GiB")):
        assert (trainer.run() / "phased_experts.json").is_file()
    assert "not compared with the teacher, the run goes on: UserError: the teacher's samples" in capsys.readouterr().err
    sharded = Trainer(build_run(changed(config, updates=1, output_dir=str(config.output_dir.with_name("shared")))))
    with (
        mock.patch.object(type(sharded.built), "evaluates_with_others", True),
        mock.patch("training.loop.teacher_comparison.validation_latents", side_effect=RuntimeError("no memory")),
        pytest.raises(
            SharedEvaluationFailed, match=r"failed in process 0, .* so the run ends: RuntimeError: no memory\."
        ),
    ):
        sharded.run()

"""Both ways to distil a guided teacher, on a tiny study: what they train, that they cost the same, what is reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import guided_samples
from benchmarks.claims.embedded.measures import measured_scenes
from benchmarks.claims.embedded.study import SETTINGS, EmbeddedStudy, Measuring
from tests.helpers.debian import installed
from training.embedded.emoji import FONT


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Few samples of few updates."""
    installed("fonts-noto-color-emoji", FONT)
    scenes = tuple(measured_scenes(clips=False)[:3])

    def make(work_dir: Path, teacher: str, guidance_scale: float) -> EmbeddedStudy:
        settings = replace(SETTINGS[teacher], guidance_scale=guidance_scale)
        return EmbeddedStudy(work_dir, teacher, settings, Measuring(scenes, 2, teacher_steps=2, resamples=2))

    monkeypatch.setattr(guided_samples, "make_study", make)
    monkeypatch.setattr(guided_samples, "USUAL", guided_samples.USUAL | {"batch_size": 2, "updates": 2})
    few = {"plan.steps": [3], "rollouts.bank": 40, "updates": 5, "checkpoints.every": 5}
    monkeypatch.setattr(guided_samples, "DENOISING", guided_samples.DENOISING | few)
    return tmp_path


def test_what_teaches_is_learned_from_the_teacher_s_samples_at_equal_evaluations(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: 5 updates of 2 samples, each forward and backward, and 40 samples of 3 guided steps; then matching."""
    page = tiny / "page.md"
    command = ["--guidance", "2", "--seeds", "1", "--work_dir", str(tiny), "--output", str(page)]
    guided_samples.main(command)
    velocities, samples = json.loads(page.with_suffix(".json").read_text("utf-8"))
    denoising, taught = guided_samples.runs(guided_samples.SAMPLES, 2.0, 1, tiny)
    assert guided_samples.evaluations(denoising) == 5 * 2 * 3 + 40 * 3 * 2
    # whole rollouts for the fake and for the expert, 6 steps of the fake, one of the expert, both backwards; its
    # score and the teacher
    each = [steps + steps - 1 + 6 + 1 + 2 * 7 + 1 + 1 for steps in (2, 4)]
    assert guided_samples.evaluations(taught) == 2 * 2 * sum(each)
    (direct,) = guided_samples.runs(guided_samples.VELOCITIES, 2.0, 1, tiny)
    of_update = 2 * (sum(each) + 2)  # guidance in both phases
    assert direct.updates == round((270 + 2 * 2 * sum(each)) / of_update) > taught.updates
    assert samples["evaluations"] == 270 + 2 * 2 * sum(each)
    assert abs(velocities["evaluations"] - samples["evaluations"]) <= of_update / 2
    assert velocities["updates"] == 2 * direct.updates and samples["updates"] == 4
    assert velocities["distance"] != samples["distance"]
    manifest = json.loads((tiny / "guidance-2-seed-1/samples/experts/phased_experts.json").read_text("utf-8"))
    assert manifest["training"]["teacher_guidance_scale"] == 2 and len(manifest["training"]["teacher_experts"]) == 1
    text = page.read_text("utf-8")
    with Image.open(tiny / "guided_samples.png") as shown:
        assert shown.width > 3 * 64
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| 2 ")]
    assert [line[1:3] for line in lines] == [
        ["guided velocities", str(2 * direct.updates)],
        ["the teacher's samples", "4"],
    ]
    with monkeypatch.context() as other:
        other.setattr(guided_samples, "PUBLISHED", page.with_suffix(".json"))
        other.setattr(guided_samples, "Trainer", lambda *_: pytest.fail("trained again"))
        guided_samples.main(command)
        kept = ["--work_dir", str(tiny / "other"), "--output", str(tiny / "kept.md"), "--published"]
        guided_samples.main([*command[:4], *kept])
    assert (tiny / "kept.md").read_text("utf-8") == text

"""Questions on a tiny study: rows differ in what is asked, and the report has what was measured and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import questions
from benchmarks.claims.embedded.measures import measured_scenes
from benchmarks.claims.embedded.study import SETTINGS, EmbeddedStudy, Measuring
from tests.helpers.debian import installed
from training.embedded.emoji import FONT


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Few samples of few updates."""
    installed("fonts-noto-color-emoji", FONT)

    def make(work_dir: Path, teacher: str, guidance_scale: float | None) -> EmbeddedStudy:
        base = SETTINGS[teacher]
        settings = replace(base, recipe=replace(base.recipe, batch_size=2), guidance_scale=guidance_scale or 2.0)
        scenes = tuple(measured_scenes(clips=False)[:3])
        study = EmbeddedStudy(work_dir, teacher, settings, Measuring(scenes, 2, teacher_steps=2, resamples=2))
        study.updates = 2
        return study

    monkeypatch.setattr(questions, "make_study", make)
    for name, value in {"BATCHES": (1,), "RANKS": (4,), "FAKES": (4, None), "STRENGTHS": (0.5,)}.items():
        monkeypatch.setattr(questions, name, value)
    return tmp_path


def test_rows_differ_in_what_is_asked_alone_and_published_ones_are_kept(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tiny / "questions.md"
    one = ["--questions", "batch", "--work_dir", str(tiny), "--output", str(page), "--rows"]
    questions.main([*one, "1 | full"])
    assert [*json.loads(page.with_suffix(".json").read_text("utf-8"))["batch"]] == ["1 | full"]
    with pytest.raises(SystemExit):
        questions.main([*one, "2 | full"])
    assert "no '2 | full' in batch: choose from 1 | rank 4; 1 | full" in capsys.readouterr().err
    command = ["--questions", "batch", "extracted", "strength_pictures", "--work_dir", str(tiny), "--output", str(page)]
    questions.main(command)
    tables = [part.splitlines() for part in page.read_text("utf-8").split("\n## ")[1:]]
    assert [table[0] for table in tables] == [
        questions.QUESTIONS[key].title for key in ("batch", "extracted", "strength_pictures")
    ]
    batch, extracted, strength = ([line.split(" | ") for line in table if line.startswith("| ")] for table in tables)
    assert [line[:2] for line in batch[2:]] == [["| 1", "rank 4"], ["| 1", "full"]]
    assert batch[2][2] != batch[3][2]
    _, _, direct, full, nearest = extracted
    assert full[1] != nearest[1] != direct[1]
    assert [line[0] for line in strength[2:]] == ["| 0.5"]
    found = json.loads(page.with_suffix(".json").read_text("utf-8"))
    assert page.read_text("utf-8") == questions.report(found)
    with monkeypatch.context() as other:
        other.setattr(questions, "PUBLISHED", page.with_suffix(".json"))
        other.setattr(EmbeddedStudy, "train", lambda *_: pytest.fail("trained again"))
        kept = tiny / "kept.md"
        arguments = ["--questions", "batch", "--work_dir", str(tiny / "other"), "--published", "--output", str(kept)]
        questions.main(arguments)
    assert kept.read_text("utf-8") == page.read_text("utf-8")

    study = next(questions.entries("strength_pictures", tiny)).study
    pairs = study.pairs(0)[:1]
    bare = study.decode(study.sampler.with_teacher(pairs, 4, study.settings.shift, 1.0))
    torch.testing.assert_close(study.shipped_samples(pairs, 4, 0.0), bare, rtol=0, atol=1e-4)
    assert torch.equal(study.shipped_samples(pairs, 4, 1.0), study.shipped_samples(pairs, 4))
    assert (study.shipped_samples(pairs, 4, 0.5) - bare).abs().max() > 0.01

    (entry, *_), (of_full,) = (
        list(questions.entries("batch", tiny)),
        [entry for entry in questions.entries("extracted", tiny) if entry.cells == ("full",)],
    )
    assert entry.run is not None and of_full.run is not None
    assert entry.run.updates == 4 and of_full.run.updates == 2
    assert not any("lora" in name for name in load_file(of_full.study.train(of_full.run)))

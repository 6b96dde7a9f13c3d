"""Runs on data in buckets: training, resumption, changed prompts, dry runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.helpers.configs import changed
from training.config.schema import ConfigError, DistillConfig
from training.data.examples import PromptError
from training.loop.build import build_run
from training.loop.dry_run import describe
from training.loop.resumption import Resume
from training.loop.trainer import Trainer

BUCKETS = [{"width": 32, "height": 16}, {"width": 16, "height": 32}]


@pytest.fixture
def bucketed(settings_of_run: dict[str, Any], tmp_path: Path) -> DistillConfig:
    """Two buckets; one example each and one for both."""
    rows = [
        {"caption": "a fox", "width": 640, "height": 300},
        {"caption": "a panda", "width": 300, "height": 640},
        {"caption": "an apple"},
    ]
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"prompts": str(path), "prompt_column": "caption", "buckets": BUCKETS}
    return changed(settings_of_run, data=data)


def metrics(config: DistillConfig) -> list[dict[str, Any]]:
    lines = (config.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) | {"time": None} for line in lines]


def test_a_run_in_buckets_resumes_to_the_same_numbers_and_notices_other_prompts(
    bucketed: DistillConfig, tmp_path: Path
) -> None:
    whole = Trainer(build_run(changed(bucketed, output_dir=str(tmp_path / "whole"))))
    shapes = []
    rng, data = whole.built.rng, whole.built.data
    noise = rng.noise
    with mock.patch.object(rng, "noise", lambda shape: shapes.append(shape) or noise(shape)):
        whole.run()
    assert {tuple(shape) for shape in shapes} == set(data.shapes) and len(data.shapes) == 2

    stopped = changed(bucketed, output_dir=str(tmp_path / "stopped"))
    trainer = Trainer(build_run(stopped))
    update = trainer.update

    def until_the_third() -> dict[str, float]:
        if trainer.progress.total == 3:
            raise RuntimeError("stopped")
        return update()

    with mock.patch.object(trainer, "update", until_the_third), pytest.raises(RuntimeError, match="stopped"):
        trainer.run()
    prompts = Path(stopped.data.prompts)
    words = prompts.read_text(encoding="utf-8")
    prompts.write_text(words.replace("a fox", "a wolf"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"words\.jsonl changed since the checkpoint") as caught:
        Trainer(build_run(stopped, Resume())).run()
    assert "\n" not in str(caught.value)
    prompts.write_text(words, encoding="utf-8")
    Trainer(build_run(stopped, Resume())).run()
    assert metrics(stopped) == metrics(changed(bucketed, output_dir=str(tmp_path / "whole")))


def test_a_dry_run_counts_the_examples_of_every_bucket(bucketed: DistillConfig) -> None:
    text = describe(bucketed)
    assert "3 prompts from" in text
    assert text.count(": 2 of them") == 2 and "32x16, latents" in text and "16x32, latents" in text


def test_sizes_that_the_model_does_not_have_and_empty_buckets_are_refused(bucketed: DistillConfig) -> None:
    odd = changed(bucketed, **{"data.buckets": [*BUCKETS, {"width": 17, "height": 16}]})
    for run in (describe, build_run):
        with pytest.raises(ConfigError, match=r"data\.buckets: .*17x16"):
            run(odd)
    shares = [{**bucket, "share": 1.0} for bucket in [*BUCKETS, {"width": 16, "height": 16}]]
    Path(bucketed.data.prompts).write_text('{"caption": "a fox", "width": 2, "height": 1}\n', encoding="utf-8")
    with pytest.raises(PromptError, match=r"no example of .* suits 16x32: leave the bucket out"):
        build_run(changed(bucketed, **{"data.buckets": shares}))
    with pytest.raises(ConfigError, match="a share is for all of them or for none, found 1 of 2"):
        changed(bucketed, **{"data.buckets": [{**BUCKETS[0], "share": 1.0}, BUCKETS[1]]})


def test_columns_can_be_the_buckets(bucketed: DistillConfig) -> None:
    rows = [{"caption": "a", "width": 32, "height": 16}, {"caption": "b", "width": 16, "height": 16}]
    Path(bucketed.data.prompts).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = changed(bucketed, **{"data.buckets": "columns"})
    data = build_run(columns).data
    assert [str(bucket) for bucket in data.buckets] == ["32x16", "16x16"]
    assert [data.prompts.members(i).tolist() for i in (0, 1)] == [[0], [1]]

"""What changes between a run and its resumption: refused, or allowed and said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import Uninterrupted
from tests.helpers.faults.distillations import Distillation

CHANGED_PROMPTS = {
    b"a panda\na fox\na pear\n": "changed since the checkpoint",
    b"a fox\na panda\n": "changed since the checkpoint",
    b"\n# none\n": "no prompts in it",
    b"a panda\na f\xf6x\n": "line 2: not UTF-8 text",
}


@pytest.fixture
def finished(distillation: Callable[..., Distillation], uninterrupted: Uninterrupted) -> Distillation:
    """A copy of a run that is done."""
    run = distillation()
    shutil.copytree(uninterrupted.run.folder, run.folder)
    return run


def test_what_changes_the_numbers_is_refused_with_a_list(finished: Distillation, uninterrupted: Uninterrupted) -> None:
    ended = finished.run("--resume", "generator.lr=0.5", "batch_size=4", "monitoring.log_every=3")
    assert ended.status == 2
    (line,) = ended.lines
    assert "batch_size: 2 -> 4; generator.lr: 0.01 -> 0.5" in line
    assert "log_every" not in line
    assert finished.results() == uninterrupted.results


def test_what_does_not_change_them_is_allowed_and_said(finished: Distillation, uninterrupted: Uninterrupted) -> None:
    ended = finished.run("--resume", "monitoring.log_every=3", "checkpoints.keep=5")
    assert ended.status == 0, ended.errors
    assert "update-00000006, with checkpoints.keep: 2 -> 5; monitoring.log_every: 1 -> 3" in ended.output
    assert finished.results() == uninterrupted.results


def test_other_prompts_are_refused(distillation: Callable[..., Distillation], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a panda\na fox\n", encoding="utf-8")
    run = distillation(updates=1, **{"data.prompts": str(prompts)})
    assert run.run().status == 0
    expected = run.results()
    for content, words in CHANGED_PROMPTS.items():
        prompts.write_bytes(content)
        ended = run.run("--resume")
        assert ended.status == 2, ended.errors
        (line,) = ended.lines
        assert str(prompts) in line and words in line
        assert run.results() == expected

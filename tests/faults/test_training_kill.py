"""kill -9 at any moment: a run that goes on ends as if nothing had happened, and nothing half-written is used."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable

import pytest

from tests.faults.conftest import Uninterrupted
from tests.helpers.faults.distillations import Distillation

KILLS = {
    "prompts are encoded": ("replace cache/", 1),
    "the configuration is written": ("write config.yaml", 1),
    "an update is noted": ("write metrics.jsonl", 2),
    "shards of a checkpoint are written": (r"write checkpoints/\.unfinished-00000002/shard", 1),
    "values of a checkpoint are written": (r"write checkpoints/\.unfinished-00000002/run", 1),
    "a checkpoint takes its place": (r"replace checkpoints/\.unfinished-00000002 ", 1),
    "samples are written": ("write samples/high_noise-final", 1),
    "experts of a phase are written": (r"write experts-high_noise/\.high_noise", 1),
    "the next checkpoint is written": (r"write checkpoints/\.unfinished-00000004/.*sha256", 1),
    "numbers that are computed again are dropped": (r"replace \.metrics", 1),
    "an old checkpoint is removed": (r"remove checkpoints/\.unfinished-removal", 2),
    "an expert is written": (r"write experts/\.low_noise", 1),
    "the first expert has its name": ("replace experts/", 2),
    "the manifest gets its name": (r"replace experts/\.phased_experts", 1),
    "the rest is written beside the experts": ("write experts/scheduler/", 1),
}
"""Just before this change to the output folder; the run goes on after each and is killed at the next."""


def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(
    distillation: Callable[..., Distillation], uninterrupted: Uninterrupted
) -> None:
    run = distillation()
    for when, (change, number) in KILLS.items():
        ended = run.run("--resume", faults=[run.at(change, "SIGKILL", number)])
        assert ended.status == -signal.SIGKILL, (when, ended.errors)
        run.check_nothing_half_written_counts()
    ended = run.run("--resume")
    assert ended.status == 0, ended.errors
    assert run.results() == uninterrupted.results


def test_a_run_that_is_killed_in_the_middle_of_a_file_ends_like_one_that_is_not(
    distillation: Callable[..., Distillation], uninterrupted: Uninterrupted
) -> None:
    """The kernel ends it at a byte: half the shards of a checkpoint are written, then half of an expert."""
    run, whole = distillation(), uninterrupted.run.folder
    (shards,) = whole.glob("checkpoints/update-00000004/*.safetensors")
    half = {"name": "largest_file", "size": shards.stat().st_size // 2}
    assert run.run(faults=[half]).status == -signal.SIGXFSZ
    assert sum(path.stat().st_size == half["size"] for path in run.folder.rglob("*")) == 1
    assert not run.checkpoints
    half["size"] = (whole / "experts" / "low_noise.safetensors").stat().st_size // 2
    assert run.run("--resume", faults=[run.at("write experts/", "SIGKILL")]).status == -signal.SIGKILL
    ended = run.run("--resume", faults=[half])
    assert ended.status == -signal.SIGXFSZ, ended.errors
    assert [path.stat().st_size for path in (run.folder / "experts").iterdir()] == [half["size"]]
    run.check_nothing_half_written_counts()
    assert run.run("--resume").status == 0
    assert run.results() == uninterrupted.results


def test_a_checkpoint_that_a_thread_writes_is_whole_or_not_there(
    distillation: Callable[..., Distillation], uninterrupted: Uninterrupted
) -> None:
    run = distillation()
    run.settings["checkpoints"] = {**run.settings["checkpoints"], "background": True}
    for change in (r"write checkpoints/\.unfinished-00000002/shard", r"replace checkpoints/\.unfinished-00000004 "):
        ended = run.run("--resume", faults=[run.at(change, "SIGKILL")])
        assert ended.status == -signal.SIGKILL, (change, ended.errors)
        run.check_nothing_half_written_counts()
    ended = run.run("--resume")
    assert ended.status == 0, ended.errors
    assert run.results() == uninterrupted.results


@pytest.mark.long
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("case", range(24))
def test_random_moments(case: int, distillation: Callable[..., Distillation], uninterrupted: Uninterrupted) -> None:
    """Killed at a random time, then at random changes to the folder until it happens to finish."""
    draw, run = random.Random(case), distillation()
    run.settings["checkpoints"] = {**run.settings["checkpoints"], "background": case % 2 == 1}
    started = run.start()
    time.sleep(draw.uniform(0, 8))
    started.send(signal.SIGKILL)
    assert started.wait().status in (-signal.SIGKILL, 0)
    run.check_nothing_half_written_counts()
    for _ in range(100):
        number = draw.randrange(1, len(uninterrupted.changes) + 1)
        status = run.run("--resume", faults=[run.at("", "SIGKILL", number)]).status
        run.check_nothing_half_written_counts()
        if status == 0:
            break
    assert status == 0
    assert run.results() == uninterrupted.results

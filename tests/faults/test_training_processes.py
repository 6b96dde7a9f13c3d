"""Two processes: pointed at one output folder by mistake, or of one run in which one of them is in trouble."""

from __future__ import annotations

import json
import math
import shutil
import signal
import socket
from collections.abc import Callable
from typing import Any

from safetensors.torch import load_file

from tests.faults.conftest import Uninterrupted
from tests.helpers.faults.distillations import EXPERTS, Distillation
from tests.helpers.faults.programs import Ended


def test_a_folder_is_of_one_process_until_that_ends(distillation: Callable[..., Distillation]) -> None:
    run = distillation()
    log = run.folder.with_name("changes")
    first = run.start(faults=[run.at("write config.yaml", "pause", log=log)])
    first.wait_for(lambda: log.exists() and "write config.yaml" in log.read_text("utf-8"))
    before = sorted(run.folder.rglob("*"))
    for arguments in ([], ["--resume"]):
        second = run.run(*arguments)
        assert second.status == 2
        (line,) = second.lines
        assert f"{run.folder}: in use by process {first.pid} on {socket.gethostname()}; " in line
    assert sorted(run.folder.rglob("*")) == before
    first.send(signal.SIGKILL)
    assert first.wait().status == -signal.SIGKILL
    assert (run.folder / "checkpoints" / ".owner").exists(), "what a killed process leaves keeps nobody out"
    assert run.run("updates=1", "checkpoints.every=2").status == 0


def test_a_second_run_is_not_mixed_into_a_first(
    distillation: Callable[..., Distillation], uninterrupted: Uninterrupted
) -> None:
    run = distillation()
    shutil.copytree(uninterrupted.run.folder, run.folder)
    ended = run.run("seed=1")
    assert ended.status == 2
    (line,) = ended.lines
    assert "holds a run with checkpoints up to update-00000006; go on with --resume" in line
    assert run.results() == uninterrupted.results


def in_two_processes(run: Distillation, *faults: dict[str, Any], resume: bool = False) -> list[Ended]:
    """A run of two processes as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    arguments = ["--resume"] if resume else []
    started = [
        run.start(*arguments, faults=faults, environment={**world, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    return [process.wait() for process in started]


def test_a_gradient_that_is_infinite_in_one_process_skips_the_step_in_all(
    distillation: Callable[..., Distillation],
) -> None:
    run = distillation()
    for ended in in_two_processes(run, {"name": "on_process", "patch": "infinite_gradient", "rank": 1}):
        assert ended.status == 0, ended.errors
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["bad_updates"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert [math.isnan(row["generator_grad_norm"]) for row in rows] == [False, False, True, False, False, False]
    for name in EXPERTS:
        weights = load_file(run.folder / "experts" / f"{name}.safetensors")
        assert all(bool(value.isfinite().all()) for value in weights.values())


def test_a_signal_to_one_process_ends_all_of_them(distillation: Callable[..., Distillation]) -> None:
    run = distillation()
    for ended in in_two_processes(run, {"name": "on_process", "patch": "sigterm", "rank": 1}):
        assert ended.status == 143, ended.errors
    assert run.checkpoints == ["update-00000002", "update-00000003"] and run.updates() == 3


def test_a_validation_that_fails_in_one_of_several_processes_ends_the_run_in_a_line(
    distillation: Callable[..., Distillation],
) -> None:
    """The other one waits for its shards. Nothing is lost, and the run goes on."""
    run = distillation()
    run.settings["parallel"] = {"sharding": "fsdp"}
    ended = in_two_processes(run, {"name": "on_process", "patch": "failing_validation", "rank": 1})
    assert [process.status for process in ended] == [2, 2]
    assert "failed in process 1, and the other processes wait" in ended[1].errors
    assert "OutOfMemoryError: Tried to allocate 8 GiB. The checkpoint of its update was written" in ended[1].errors
    assert run.checkpoints == ["update-00000002", "update-00000003"]
    run.settings["parallel"] = {}
    assert run.run("--resume").status == 0


def test_checkpoints_that_threads_of_two_processes_write_are_whole_or_not_there(
    distillation: Callable[..., Distillation],
) -> None:
    """Shards of a full fake; the first process is killed while the other waits for it, in both threads."""
    sharded = {"fake": {"kind": "full", "lr": 1e-3}, "parallel": {"sharding": "fsdp"}}
    whole, run = distillation("whole"), distillation()
    for each in (whole, run):
        each.settings.update(sharded)
    assert [ended.status for ended in in_two_processes(whole)] == [0, 0]
    run.settings["checkpoints"] = {**run.settings["checkpoints"], "background": True}
    killed, other = in_two_processes(run, run.at(r"replace checkpoints/\.unfinished-00000004 ", "SIGKILL"))
    assert killed.status == -signal.SIGKILL and other.status, (killed.errors, other.errors)
    run.check_nothing_half_written_counts()
    assert run.checkpoints == ["update-00000002", "update-00000003"]
    for ended in in_two_processes(run, resume=True):
        assert ended.status == 0, ended.errors
    assert run.results() == whole.results()

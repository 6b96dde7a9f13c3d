"""SIGINT and SIGTERM: the update is finished, a checkpoint written, one line says so; a second SIGINT ends at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import Uninterrupted
from tests.helpers.faults.distillations import Distillation
from tests.helpers.faults.programs import ENVIRONMENT, PATIENCE
from training.loop.checkpoints import list_checkpoints, load_values

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_a_run_after_its_update(
    name: str, status: int, distillation: Callable[..., Distillation], uninterrupted: Uninterrupted
) -> None:
    """In the third update, which is the last of its phase and has samples due, but no checkpoint."""
    run = distillation()
    ended = run.run(faults=[run.at("write metrics.jsonl", name, 3)])
    assert ended.status == status, ended.errors
    asked, said = ended.lines
    assert asked.startswith(f"distill.py: {name}: stopping after this update")
    kept = run.folder / "checkpoints" / "update-00000003"
    assert said == f"distill.py: stopped by {name}, all is in {kept}: go on with --resume"
    assert "Traceback" not in ended.errors
    assert run.checkpoints == ["update-00000002", "update-00000003"] and run.updates() == 3
    assert run.run("--resume").status == 0
    assert run.results() == uninterrupted.results


def test_a_second_sigint_ends_a_run_at_once(
    distillation: Callable[..., Distillation], uninterrupted: Uninterrupted
) -> None:
    run = distillation()
    log = run.folder.with_name("changes")
    started = run.start(faults=[run.at("write metrics.jsonl", "pause", 3, log)])
    started.wait_for(lambda: log.exists() and log.read_text("utf-8").count("write metrics.jsonl") == 3)
    started.send(signal.SIGINT)
    started.wait_for(lambda: "stopping after this update" in started.errors.read_text("utf-8"))
    started.send(signal.SIGTERM)  # changes nothing: launchers send it once more
    time.sleep(0.2)
    started.send(signal.SIGINT)
    assert started.wait().status == -signal.SIGINT
    assert run.checkpoints == ["update-00000002"]
    assert run.run("--resume").status == 0
    assert run.results() == uninterrupted.results


def test_the_command_itself_from_outside(distillation: Callable[..., Distillation]) -> None:
    """Thousands of updates, of which nobody knows which one is in progress."""
    run = distillation(updates=5000, **{"checkpoints.every": 5000, "validation.every": None})
    command = [sys.executable, str(ROOT / "training" / "distill.py"), *run.command()]
    program = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's background ignores it
    )
    end = time.monotonic() + PATIENCE
    while run.updates() < 2:
        assert program.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    program.send_signal(signal.SIGINT)
    errors = program.communicate(timeout=PATIENCE)[1]
    assert program.returncode == 130, errors
    (kept,) = list_checkpoints(run.folder / "checkpoints")
    assert load_values(kept)["progress"]["total"] == run.updates() >= 2
    assert f"distill.py: stopped by SIGINT, all is in {kept}: go on with --resume\n" in errors

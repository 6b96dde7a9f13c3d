"""Launch scripts: what they do with signals is what a run expects, also when they run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import tomllib
from pathlib import Path

import pytest

from training.distill import make_parser
from training.loop.signals import SIGNALS

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "docs" / "examples" / "launch"
SLURM = (LAUNCH / "slurm.sbatch").read_text(encoding="utf-8")


def test_slurm_stops_a_run_by_a_signal_that_it_takes_and_in_time() -> None:
    (receiver, name, seconds) = re.findall(r"^#SBATCH --signal=(B):(\w+)@(\d+)$", SLURM, re.MULTILINE)[0]
    assert receiver == "B" and re.search(rf"^trap .* {name}$", SLURM, re.MULTILINE), "this script takes it"
    assert signal.Signals[f"SIG{name}"] not in SIGNALS, "the processes must not be sent it"
    (sent,) = re.findall(r"scancel --signal=(\w+)", SLURM)
    assert signal.Signals[f"SIG{sent}"] in SIGNALS
    (timeout,) = re.findall(r"--shutdown-timeout=(\d+)", SLURM)
    assert 600 <= int(timeout) < int(seconds), "torchrun waits for the update, and Slurm for torchrun"
    assert "#SBATCH --requeue" in SLURM


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch", "Dockerfile"])
def test_options_are_those_of_the_command(name: str) -> None:
    text = (LAUNCH / name).read_text(encoding="utf-8")
    given = re.findall(r" (--[a-z_]+)\b", text.partition("training/distill.py")[2])
    known = {option for action in make_parser()._actions for option in action.option_strings}
    assert {"--config", "--output_dir", "--resume"} <= set(given) & known


def test_the_image_installs_extras_that_there_are() -> None:
    extras = re.findall(r'-e "\.\[([a-z,-]+)\]"', (LAUNCH / "Dockerfile").read_text(encoding="utf-8"))[0].split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras) <= set(project["optional-dependencies"])


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """Programs of the names of Slurm's; the run waits for TERM, which scancel sends it, and takes a moment then."""
    programs = {
        "srun": 'echo "srun $@" >> log; trap "sleep .3; echo checkpoint >> log; exit 143" TERM; echo $$ > pid\n'
        "while [ ! -e finished ]; do sleep .05; done; exit 0",
        "scancel": 'echo "scancel $@" >> log; kill -TERM "$(cat pid)"',
        "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; else echo "scontrol $@" >> log; fi',
    }
    for name, text in programs.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        path.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("stopped", [True, False])
def test_a_job_whose_time_is_up_is_queued_again_after_its_checkpoint(cluster: Path, stopped: bool) -> None:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    environment = {**os.environ, **slurm, "PATH": f"{cluster}:{os.environ['PATH']}"}
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "run.yaml", "out", "seed=3"]
    job = subprocess.Popen(command, cwd=cluster, env=environment)
    deadline = time.monotonic() + 20
    while not (cluster / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    if stopped:
        job.send_signal(signal.SIGUSR1)
    else:
        (cluster / "finished").touch()
    assert job.wait(20) == (143 if stopped else 0)
    started, *after = (cluster / "log").read_text(encoding="utf-8").splitlines()
    assert started.endswith("training/distill.py --config run.yaml --output_dir out --resume seed=3")
    assert "--rdzv_endpoint=node1:29500" in started
    assert after == (["scancel --signal=TERM 7", "checkpoint", "scontrol requeue 7"] if stopped else [])

"""Several processes: one run, one set of files, weights in step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from pdmd_core.experts import PhasedExperts
from training.checkpoints import list_checkpoints, load_checkpoint

ROOT = Path(__file__).parents[2]


def launch(config: Path, *arguments: str, processes: int = 2) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = [str(ROOT / "training" / "distill.py"), "--config", str(config), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, *script], capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_two_processes_make_one_run_and_resume_it(settings_of_run: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**settings_of_run, "checkpoint_every": 5}), encoding="utf-8")
    run = tmp_path / "run"
    assert launch(config).count("experts: ") == 1
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["update"] for line in lines] == [1, 2, 3, 4, 5, 6]
    experts = PhasedExperts.open(run / "experts")
    assert experts.manifest.training["batch_size"] == 2 * settings_of_run["batch_size"]
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    generators = load_checkpoint(checkpoint)["local_generators"]
    assert generators.shape[0] == 2
    assert not torch.equal(generators[0], generators[1]), "processes draw different samples"

    before = {name: experts.lora_state(name) for name in ("high_noise", "low_noise")}
    assert "resumed from" in launch(config, "--resume")
    again = PhasedExperts.open(run / "experts")
    for name, state in before.items():
        for key, value in again.lora_state(name).items():
            torch.testing.assert_close(value, state[key], rtol=1e-5, atol=1e-6)
    assert len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 6

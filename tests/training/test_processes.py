"""Several processes: one run, one set of files, weights in step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pdmd_core.experts import PhasedExperts
from tests.tiny_families import wan_two_networks
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
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["update-00000005"]

    before = {name: experts.lora_state(name) for name in ("high_noise", "low_noise")}
    assert "resumed from" in launch(config, "--resume")
    again = PhasedExperts.open(run / "experts")
    for name, state in before.items():
        for key, value in again.lora_state(name).items():
            torch.testing.assert_close(value, state[key], rtol=1e-5, atol=1e-6)
    assert len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 6


@pytest.mark.timeout(300)
def test_processes_whose_samples_lie_on_different_networks_stay_in_step(
    settings_of_run: dict[str, Any], tmp_path: Path
) -> None:
    """One sample each: in most fake updates one process asks one network and the other process the other."""
    wan_two_networks().save_pretrained(tmp_path / "two")
    config = tmp_path / "config.yaml"
    model = {**settings_of_run["model"], "path": str(tmp_path / "two")}
    plan = {"steps": [1, 1], "shift": 5.0}
    changes = {"model": model, "plan": plan, "batch_size": 1, "fake_updates": 4, "checkpoint_every": 6}
    config.write_text(yaml.safe_dump({**settings_of_run, **changes}), encoding="utf-8")
    assert launch(config).count("experts: ") == 1
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    fake = load_checkpoint(checkpoint)["roles"]["fake"]
    assert {name.partition(".")[0] for name, v in fake.items() if "lora_B" in name and v.any()} == {
        "transformer",
        "transformer_2",
    }

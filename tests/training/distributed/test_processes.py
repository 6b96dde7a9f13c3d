"""Several processes, with weights whole or in shards: the numbers of one process, one set of files, any resumption.

Wan's teachers have two networks and a process has two samples at a time, so that in many updates the samples of one
process lie on one network and those of the other on the other. Everything runs in two launches of torchrun.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from pdmd_core.experts import PhasedExperts
from tests.helpers.configs import changed
from tests.helpers.families.qwen_image import qwen_image
from tests.helpers.families.wan import wan_image_two_networks, wan_two_networks
from tests.helpers.prompt_files import write_prompts
from training.config.schema import ConfigError, load_config, with_values
from training.distributed.sharding import check_processes
from training.loop.build import build_run
from training.loop.checkpoints import list_checkpoints
from training.loop.resumption import Resume
from training.loop.trainer import Trainer

ROOT = Path(__file__).parents[3]
TEACHERS = {
    "wan": (wan_two_networks, (16, 32, 5), 12),
    "image": (wan_image_two_networks, (16, 32, 5), 12),
    "qwen": (qwen_image, (32, 48, 1), 143),
}
"""How it is built; height, width and frames; tokens of a prompt, an odd number where processes divide them."""
HALF = {"dtype": "bfloat16", "precision": "bf16", "memory.micro_batch_size": 1, "memory.gradient_checkpointing": True}
DENOISING = {"objective.expert_loss": "denoising", "objective.path_steps": 1, "rollouts.bank": 5}
LORA, FULL = {"kind": "lora", "rank": 4, "alpha": 4, "lr": 1e-2}, {"kind": "full", "lr": 1e-3}
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"generator": LORA, "fake": FULL},
    "lora-fsdp": {"parallel.sharding": "fsdp", "memory.micro_batch_size": 1, "memory.gradient_checkpointing": True},
    "lora-1-to-2": {"parallel.sharding": "fsdp"},
    "lora-2-to-1": {},
    "lora-cp": {
        "parallel.context_parallel": 2,
        "memory.guidance_batched": False,
        "memory.gradient_checkpointing": True,
    },
    "lora-1-to-cp": {"parallel.context_parallel": 2, "memory.micro_batch_size": 1},
    "full": {"generator": FULL, "fake": LORA},
    "full-none": {},
    "full-hsdp": {"parallel.sharding": "hsdp", "parallel.shard_size": 1},
    "full-2-to-1": {},
    "full-cp-fsdp": {"parallel.context_parallel": 2, "parallel.sharding": "fsdp"},
    "image": {"teacher": "image", "generator": LORA, "fake": LORA, "rollouts.bank": 5},
    "image-1-to-2": {"parallel.sharding": "fsdp"},
    "qwen": {"teacher": "qwen", "generator": LORA, "fake": LORA},
    "qwen-1-to-2": {"parallel.sharding": "fsdp"},
    "qwen-cp": {"parallel.context_parallel": 2},
    "half": {**HALF, "generator": LORA, "fake": LORA},
    "half-fsdp": {"parallel.sharding": "fsdp"},
    "sent": {**HALF, "generator": LORA, "fake": FULL},
    "sent-fsdp": {"parallel.sharding": "fsdp"},
    "sent-cp": {"parallel.context_parallel": 2},
    "warm": {"generator": FULL, "fake": LORA, "start.warm": True},
    "warm-fsdp": {"parallel.sharding": "fsdp"},
    "denoised": {"teacher": "qwen", "plan.steps": [3], "generator": LORA, "fake": LORA, **DENOISING},
    "denoised-fsdp": {"parallel.sharding": "fsdp"},
    "taught": {
        "teacher": "qwen",
        "taught": "denoised",
        "objective.guidance_scale": 1.0,
        "generator": LORA,
        "fake": LORA,
    },
    "taught-fsdp": {"parallel.sharding": "fsdp"},
}
"""What a run changes of the one before its dash; the teacher is Wan's unless it says otherwise.

Runs without a dash are of one process, those after them must have the same numbers. Rollouts of "image" begin with a
bank, which its resumption on two processes makes again. "half" and "sent" have a base in bfloat16 (of which diffusers
keeps some weights in float32), train float32 and compute in bfloat16; "sent" has full copies, whose blocks are sent in
bfloat16. The one expert of "denoised" teaches "taught".
"""
ALONE = [name for name in RUNS if "-" not in name]
NUMBERS = ("generator_loss", "fake_loss", "generator_grad_norm", "fake_grad_norm")
TOLERANCE = dict.fromkeys(NUMBERS, 1e-4)
"""Relative: sums in another order."""
SENT = {"fake_loss": 0.005, "fake_grad_norm": 0.01, "generator_loss": 0.1, "generator_grad_norm": 0.1}
"""Of "sent", where norms and biases of the fake are rounded too; the generator's are of differences between scores."""


@dataclass(frozen=True)
class Finished:
    folder: Path
    output: str
    """Of the run that was started from the command line."""

    def metrics(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text("utf-8").splitlines()]


def launch(*command: str) -> str:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run([*torchrun, *command], capture_output=True, text=True, env=environment, timeout=800)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def go_on_from(folder: Path, before: str, name: str) -> None:
    """Leave in the folder of ``name`` what a run of ``before`` had when it was stopped after three updates."""
    later = shutil.ignore_patterns("update-00000004")  # of the end of its last phase
    shutil.copytree(folder / before / "checkpoints", folder / name / "checkpoints", ignore=later)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("runs")
    teachers = {}
    for name, (build, (height, width, frames), tokens) in TEACHERS.items():
        build().save_pretrained(folder / "teachers" / name)
        model = {"path": str(folder / "teachers" / name), "height": height, "width": width, "frames": frames}
        prompts = write_prompts(folder / "teachers" / name, images=name == "image")
        teachers[name] = {"model": {**model, "max_sequence_length": tokens}, "data.prompts": str(prompts)}
    shared: dict[str, Any] = {"plan": {"steps": [1, 1], "shift": 5.0}, "objective": {"guidance_scale": 2.0}}
    shared |= {"updates": 2, "batch_size": 4, "fake_updates": 2, "ema_decay": 0.9, "checkpoints.every": 3}
    shared |= {"monitoring.log_every": 1, "monitoring.tracker": None, "validation.every": None, "validation.seeds": 1}
    configs: dict[str, str] = {}
    for name, changes in RUNS.items():
        settings = {**shared, **RUNS[name.partition("-")[0]], **changes, "output_dir": str(folder / name)}
        settings |= copy.deepcopy(teachers[settings.pop("teacher", "wan")])
        if settings.get("start.warm"):
            settings["start.experts"] = str(folder / "lora" / "experts")
        if teaches := settings.pop("taught", None):
            settings["model"]["experts"] = str(folder / teaches / "experts")
        settings["model"]["dtype"] = settings.pop("dtype", "float32")
        configs[name] = str(folder / f"{name}.yaml")
        Path(configs[name]).write_text(yaml.safe_dump(with_values({}, settings)), encoding="utf-8")
    for name in ALONE:
        AcceleratorState._reset_state()  # it keeps the precision of the first run in a process
        Trainer(build_run(load_config(Path(configs[name])))).run()
    output = launch(str(ROOT / "training" / "distill.py"), "--config", configs["lora-fsdp"])
    AcceleratorState._reset_state()
    two = [
        "full-none",
        "full-hsdp",
        "half-fsdp",
        "sent-fsdp",
        "sent-cp",
        "lora-cp",
        "full-cp-fsdp",
        "qwen-cp",
        "warm-fsdp",
        "denoised-fsdp",
        "taught-fsdp",
    ]
    for name in ("lora-1-to-2", "image-1-to-2", "qwen-1-to-2", "lora-1-to-cp"):
        go_on_from(folder, name.partition("-")[0], name)
        two.append(name)
    launch(str(ROOT / "tests" / "helpers" / "run_configs.py"), *map(configs.__getitem__, two))
    go_on_from(folder, "lora-fsdp", "lora-2-to-1")
    go_on_from(folder, "full-hsdp", "full-2-to-1")
    for name in ("lora-2-to-1", "full-2-to-1"):
        Trainer(build_run(load_config(Path(configs[name])), Resume())).run()
    return Finished(folder, output)


@pytest.mark.timeout(1800)
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name not in ALONE])
def test_the_numbers_are_those_of_one_process(runs: Finished, name: str) -> None:
    expected, found = runs.metrics(name.partition("-")[0]), runs.metrics(name)
    if "-to-" in name:
        expected = expected[3:]
    assert [row["update"] for row in found] == [row["update"] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert row.keys() == wanted.keys() >= {"generator_loss", "generator_grad_norm"}
        tolerances = SENT if name.startswith("sent") else TOLERANCE
        for key, tolerance in [(key, tolerances[key]) for key in NUMBERS if key in row]:
            assert row[key] == pytest.approx(wanted[key], rel=tolerance), (row["update"], key)


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ALONE and not name.startswith("sent")])
def test_the_experts_are_those_of_one_process(runs: Finished, name: str) -> None:
    kind = name.partition("-")[0]
    wanted, found = (PhasedExperts.open(runs.folder / run / "experts") for run in (kind, name))
    assert found.manifest.training == wanted.manifest.training
    assert found.manifest.base.fingerprints == wanted.manifest.base.fingerprints is not None
    for expert in [one.name for one in wanted.manifest.experts]:
        before, after = wanted.tensors(expert), found.tensors(expert)
        assert set(before) == set(after)
        difference = torch.cat([(after[key] - before[key]).flatten() for key in before]).norm()
        # Not closer: where a gradient is nothing but rounding, AdamW makes of it a step of full length.
        assert difference < 0.02 * torch.cat([value.flatten() for value in before.values()]).norm()


def test_processes_leave_one_set_of_files_and_one_line_of_output(runs: Finished) -> None:
    assert runs.output.count("experts: ") == 1
    assert runs.output.count("high_noise") == 1, "the plan is printed once"
    assert {path.name for path in (runs.folder / "lora-fsdp").iterdir()} == {
        path.name for path in (runs.folder / "lora").iterdir()
    }
    kept = [f"update-0000000{update}" for update in (2, 3, 4)]  # of ends of phases too
    assert [path.name for path in list_checkpoints(runs.folder / "lora-fsdp" / "checkpoints")] == kept


def test_each_process_writes_its_shards_of_the_fake_once(runs: Finished) -> None:
    whole, sharded = (list_checkpoints(runs.folder / name / "checkpoints")[-1] for name in ("lora", "lora-fsdp"))
    sizes = sorted(path.stat().st_size for path in sharded.glob("*.safetensors"))
    assert len(sizes) == 2 and sizes[0] > 0.3 * sum(sizes)
    (size,) = (path.stat().st_size for path in whole.glob("*.safetensors"))
    assert size < sum(sizes) < 1.5 * size  # more pieces, each with a header; written by both it would be twice as much


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 6}, "batch_size: 6 samples cannot be divided among 4 processes"),
        (
            {"batch_size": 8, "score_groups": 4},
            "score_groups: 2 samples of a process cannot be divided into 4 groups",
        ),
        ({"parallel.context_parallel": 3}, "parallel.context_parallel: 4 processes cannot be divided into groups of 3"),
        (
            {"parallel.context_parallel": 2, "batch_size": 3},
            "batch_size: 3 samples cannot be divided among 2 groups of 2 processes",
        ),
        (
            {"parallel.sharding": "hsdp", "parallel.shard_size": 3},
            "parallel.shard_size: 4 processes cannot be divided into groups of 3",
        ),
    ],
)
def test_what_processes_cannot_divide_is_one_line(
    settings_of_run: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check_processes(changed(settings_of_run, **changes), 4)
    assert str(error.value) == words
    check_processes(
        changed(settings_of_run, **{"batch_size": 8, "parallel.sharding": "hsdp", "parallel.shard_size": 2}), 4
    )
    check_processes(changed(settings_of_run, batch_size=2, **{"parallel.context_parallel": 2}), 4)

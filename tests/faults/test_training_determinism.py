"""Same seed, same machine, same result: training, sampling and evaluation in two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.faults.conftest import Uninterrupted
from tests.helpers.faults.distillations import Distillation
from tests.helpers.faults.programs import ENVIRONMENT, PATIENCE

ROOT = Path(__file__).parents[2]
PROGRAMS = """
import json, sys
import torch
from training import distill, evaluate, sample
torch.set_num_threads(1)
for program, arguments in json.loads(sys.argv[1]):
    status = {"distill": distill, "evaluate": evaluate, "sample": sample}[program].main(arguments)
    if status:
        sys.exit(status)
"""


def test_everything_is_the_same_in_another_process(
    distillation: Callable[..., Distillation], uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    """Bit for bit, whatever order Python's sets have."""
    results, reports = [], []
    for hash_seed in ("1", "2"):
        run = distillation(hash_seed)
        experts, prompts = ["--experts", str(run.folder / "experts")], str(run.settings["data"]["prompts"])
        output = str(run.folder / "samples" / "sampled.png")
        sampled = [*experts, "--prompts", prompts, "--seeds", "0", "1", "--output", output]
        compared = [*experts, "--prompts", prompts, "--seeds", "2", "--teacher_steps", "2", "--device", "cpu"]
        compared += ["--metrics", "diversity", "--output_dir", str(run.folder)]
        steps = [("distill", run.command()), ("sample", sampled), ("evaluate", compared)]
        subprocess.run(
            [sys.executable, "-c", PROGRAMS, json.dumps(steps)],
            env={**ENVIRONMENT, "PYTHONHASHSEED": hash_seed},
            cwd=ROOT,
            check=True,
            timeout=2 * PATIENCE,
        )
        results.append(run.results() | {"report.png": (run.folder / "report.png").read_bytes()})
        report = json.loads((run.folder / "report.json").read_text("utf-8").replace(str(run.folder), "the run"))
        for row in report["rows"]:
            assert row.pop("seconds") >= 0
        reports.append(report)
    assert results[0] == results[1]
    assert reports[0] == reports[1]
    shared = results[0].keys() & uninterrupted.results.keys()
    assert {name: results[0][name] for name in shared} == uninterrupted.results, "a third process says the same"

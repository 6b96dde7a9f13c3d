"""At which update runs of the demo are called broken or over-saturated, and that healthy ones are not.

Writes what every run showed, by which the tests check thresholds, and prints the table of docs/training.md.

python benchmarks/cost/early_warnings.py --work_dir runs/early_warnings
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training.config.schema import load_config
from training.monitoring.jsonl import JsonLines, monitoring_log

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests" / "training" / "monitoring" / "recorded_runs.json"
CONFIG = ROOT / "training" / "configs" / "embedded_demo.yaml"
SHORT = ("batch_size=8", "updates=[20,10]")
LAGGING = ("generator.lr=0.003", "fake.lr=1e-5", "draws_per_rollout=1", "updates=[10,40]")
"""The fake hardly learns, so that guidance pulls without end."""
RUNS: dict[str, tuple[str, ...]] = {
    "broken, generator.lr 0.03": (*SHORT, "generator.lr=0.03"),
    "broken, generator.lr 0.1": (*SHORT, "generator.lr=0.1"),
    "over-saturated, batch 4": (*LAGGING, "batch_size=4"),
    "over-saturated, batch 1": (*LAGGING, "batch_size=1"),
    **{f"healthy, seed {seed}": (*SHORT, f"seed={seed}") for seed in range(10, 20)},
}
UPDATES = ("score_distance", "fake_loss", "generator_grad_norm", "fake_grad_norm")


def main() -> None:
    """Make the runs that are not there, and record all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/early_warnings"))
    work = parser.parse_args().work_dir
    from training.loop.build import build_run
    from training.loop.trainer import Trainer

    recorded = []
    for name, overrides in RUNS.items():
        folder = work / name.replace(" ", "_").replace(",", "")
        keys = (
            f"output_dir={folder}",
            f"data.cache_dir={work / 'cache'}",
            "validation.every=10",
            "checkpoints.every=10",
        )
        monitoring = ("monitoring.tracker=null", "monitoring.log_every=1", "monitoring.page=false")
        if not (folder / "experts" / "phased_experts.json").exists():
            Trainer(build_run(load_config(CONFIG, (*overrides, *keys, *monitoring)))).run()
        recorded.append(record(name, folder))
        called = {line["kind"]: line["update"] for line in reversed(monitoring_log(folder, "warnings").read())}
        print(f"| {name} | {', '.join(f'{kind} {update}' for kind, update in called.items()) or 'nothing'} |")
    RECORD.write_text(json.dumps(recorded, indent=0) + "\n", encoding="utf-8")


def record(name: str, folder: Path) -> dict[str, Any]:
    """What a run showed, in few digits."""
    updates = JsonLines(folder / "metrics.jsonl").read()
    teacher = json.loads((folder / "watch" / "teacher.json").read_text(encoding="utf-8"))
    return {
        "name": name,
        "teacher": {phase: _short(numbers) for phase, numbers in teacher.items()},
        "experts": [line["expert"] for line in updates],
        **{key: [_digits(line[key]) for line in updates] for key in UPDATES},
        "validations": [_short(line) for line in monitoring_log(folder, "validations").read()],
    }


def _short(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _digits(value) for key, value in numbers.items() if value is not None}


def _digits(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()

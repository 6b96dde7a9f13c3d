"""What reusing rollouts, or their beginnings, costs and gains: ``python benchmarks/cost/rollout_reuse.py``.

Trains the demo's recipe with the same number of generator updates and of fake gradient steps, taking 1 or more of the
fake steps from each rollout, or beginning all rollouts of the second phase with a bank of what the first expert made
once, over several seeds. Forty minutes on an idle core. Writes docs/benchmarks/rollout_reuse.json and prints the table:
mean and sample standard deviation over seeds of the Frechet distance to the teacher, of diversity and of processor
seconds in training (which other work on the machine does not change much).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training import evaluate
from training.config.schema import load_config
from training.loop.build import build_run
from training.loop.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
VARIANTS: dict[str, tuple[int, int, int | None]] = {
    "1 fake step a rollout": (6, 1, None),
    "2 fake steps a rollout": (3, 2, None),
    "6 fake steps a rollout": (1, 6, None),
    "1 fake step a rollout, a bank of 512": (6, 1, 512),
    "6 fake steps a rollout, a bank of 512": (1, 6, 512),
}
"""Name to (rollouts, fake steps on each, samples in the bank): six fake steps for each generator update in all."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "training/configs/embedded_demo.yaml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=50, help="generator updates of each phase (default: 50)")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs/rollout_reuse")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/rollout_reuse.json")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    rows: list[dict[str, Any]] = []
    for name, (rollouts, draws, bank) in VARIANTS.items():
        for seed in range(arguments.seeds):
            folder = arguments.work_dir / f"draws-{draws}-bank-{bank or 0}-seed-{seed}"
            overrides = [
                f"fake_updates={rollouts}",
                f"draws_per_rollout={draws}",
                f"rollouts.bank={'null' if bank is None else bank}",
                f"seed={seed}",
                "validation.every=null",
            ]
            overrides += [f"updates={arguments.updates}"]
            config = load_config(arguments.config, [*overrides, f"output_dir={folder}", "monitoring.tracker=null"])
            start = time.process_time()
            experts = Trainer(build_run(config)).run()
            seconds = time.process_time() - start
            measured = ["--experts", str(experts), "--output_dir", str(folder), "--cache_dir", str(arguments.work_dir)]
            measured += ["--no_noise_floor", "--few_steps", "--metrics", "frechet", "diversity"]
            if evaluate.main(measured):
                raise SystemExit(1)
            (row,) = json.loads((folder / "report.json").read_text(encoding="utf-8"))["rows"]
            rows.append(
                {
                    "variant": name,
                    "seed": seed,
                    "frechet": row["frechet"],
                    "diversity": row["diversity"],
                    "processor_seconds": round(seconds, 1),
                }
            )
            print(rows[-1], flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(
        json.dumps({"config": arguments.config.name, "updates": arguments.updates, "rows": rows}, indent=2) + "\n"
    )
    print("| variant | FD-Emoji to the teacher | diversity | processor seconds |")
    print("| --- | ---: | ---: | ---: |")
    for name in VARIANTS:
        cells = []
        for key in ("frechet", "diversity", "processor_seconds"):
            values = [float(row[key]) for row in rows if row["variant"] == name]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

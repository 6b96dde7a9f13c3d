"""What reusing rollouts, or their beginnings, costs and gains: ``python benchmarks/cost/rollout_reuse.py``.

Trains the demo's recipe with the same number of generator updates and of fake gradient steps, taking 1 or more of the
fake steps from each rollout, or beginning all rollouts of the second phase with a bank of what the first expert made
once, over several seeds. Forty minutes on an idle core; what was finished is not repeated. Writes
docs/benchmarks/rollout_reuse.json and .md: mean and sample standard deviation over seeds of the Frechet distance to the
teacher, of diversity and of processor seconds in training (which other work on the machine does not change much).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.claims.common.evidence import Spread, markdown_table
from benchmarks.cost.random_wan import machine
from benchmarks.cost.results import write_result
from pdmd_core.arguments import COUNT
from training import evaluate
from training.config.schema import ConfigError, load_config
from training.loop.build import build_run
from training.loop.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
VARIANTS: dict[str, tuple[int, int, int | None]] = {
    "1 fake step a rollout": (6, 1, None),
    "6 fake steps a rollout": (1, 6, None),
    "1 fake step a rollout, a bank of 512": (6, 1, 512),
    "6 fake steps a rollout, a bank of 512": (1, 6, 512),
}
"""Name to (rollouts, fake steps on each, samples in the bank): six fake steps for each generator update in all."""


Row = dict[str, Any]


def row(name: str, seed: int, config: Path, updates: int, work_dir: Path) -> Row:
    """Train and evaluate a variant with a seed, or read what is there."""
    rollouts, draws, bank = VARIANTS[name]
    folder = work_dir / f"draws-{draws}-bank-{bank or 0}-seed-{seed}"
    found = folder / "row.json"
    if found.exists():
        return json.loads(found.read_text(encoding="utf-8"))
    shutil.rmtree(folder, ignore_errors=True)  # cut off: its seconds would not be those of the whole
    overrides = [f"fake_updates={rollouts}", f"draws_per_rollout={draws}", f"seed={seed}", f"updates={updates}"]
    overrides += [f"rollouts.bank={'null' if bank is None else bank}", "validation.every=null"]
    settings = load_config(config, [*overrides, f"output_dir={folder}", "monitoring.tracker=null"])
    start = time.process_time()
    experts = Trainer(build_run(settings)).run()
    seconds = time.process_time() - start
    measured = ["--experts", str(experts), "--output_dir", str(folder), "--cache_dir", str(work_dir)]
    measured += ["--no_noise_floor", "--few_steps", "--metrics", "frechet", "diversity"]
    if evaluate.main(measured):
        raise SystemExit(1)
    (report,) = json.loads((folder / "report.json").read_text(encoding="utf-8"))["rows"]
    own = {"variant": name, "seed": seed, "frechet": report["frechet"], "diversity": report["diversity"]}
    found.write_text(json.dumps(own | {"processor_seconds": round(seconds, 1)}) + "\n", encoding="utf-8")
    return json.loads(found.read_text(encoding="utf-8"))


def table(rows: Sequence[Row]) -> str:
    """A line for each variant."""
    lines = []
    for name in VARIANTS:
        cells = []
        for key, digits in (("frechet", 4), ("diversity", 2), ("processor_seconds", 0)):
            values = [float(row[key]) for row in rows if row["variant"] == name]
            cells.append(Spread.of(values).text(1, digits))
        lines.append([name, *cells])
    return markdown_table(("variant", "FD-Emoji to the teacher", "diversity", "processor seconds"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "training/configs/embedded_demo.yaml")
    parser.add_argument("--seeds", type=COUNT, default=3)
    parser.add_argument("--updates", type=COUNT, default=50, help="generator updates of each phase (default: 50)")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs/rollout_reuse", help="what is there goes on")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/rollout_reuse")
    arguments = parser.parse_args()
    for name in ("config", "work_dir", "output"):
        setattr(arguments, name, getattr(arguments, name).absolute())
    try:
        load_config(arguments.config)
    except ConfigError as error:
        parser.error(str(error))
    os.chdir(ROOT)
    rows = []
    for name in VARIANTS:
        for seed in range(arguments.seeds):
            rows.append(row(name, seed, arguments.config, arguments.updates, arguments.work_dir))
            print(rows[-1], flush=True)
    about = (
        f"`{arguments.config.name}` with {arguments.updates} generator updates a phase and six fake steps for each, "
        "all from one rollout or each from one of its own. With a bank, rollouts of the second phase begin with 512 "
        "samples that the first expert made once. Mean ± sample standard deviation over "
        f"{arguments.seeds} seeds; {machine('cpu')}. Written by `python benchmarks/cost/rollout_reuse.py`."
    )
    result = {"config": arguments.config.name, "updates": arguments.updates, "rows": rows}
    write_result(arguments.output, result, f"# Reusing rollouts\n\n{about}\n\n{table(rows)}\n")
    print(table(rows))


if __name__ == "__main__":
    main()

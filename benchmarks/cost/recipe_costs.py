"""What each recipe costs, by its dry run: the table of docs/training.md.

    python benchmarks/cost/recipe_costs.py

The numbers are counted on the meta device from the architectures, nothing is measured.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training.config.schema import load_config
from training.loop.dry_run import describe

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "training.md"
BEGIN, END = "<!-- recipe_costs.py -->\n", "<!-- end -->\n"
MODELS = {"wan2_1_t2v_1_3b": 8, "wan2_1_t2v_14b": 8, "wan2_2_t2v_a14b": 16, "wan2_2_i2v_a14b": 16, "qwen_image": 8}
"""Recipes, and on how many GPUs those with full copies are described."""


def row(recipe: str, gpus: int) -> str:
    """One row of the table."""
    config = load_config(ROOT / "training" / "configs" / f"{recipe}.yaml")
    text = describe(config, gpus=gpus)
    memory = re.findall(r"^  all +([\d.]+ [GM]iB):", text, re.MULTILINE)[0]
    ratio = re.findall(r"^  ratio +([\d.]+):", text, re.MULTILINE)[0]
    evaluations = re.findall(r"phase (\w+): (\d+) updates, ([\d.]+) network evaluations", text)
    each = " + ".join(value for _, _, value in evaluations)
    total = sum(int(updates) * float(value) * config.batch_size for _, updates, value in evaluations)
    return f"| `{recipe}` | {gpus} | {memory} | {ratio} | {config.batch_size} | {each} | {total / 1e6:.3g} M |"


def table() -> str:
    """All rows under their header."""
    lines = [
        "| recipe | GPUs | static memory | over teacher | samples | evaluations of a sample | evaluations in all |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model, gpus in MODELS.items():
        lines += [row(f"{model}_phased_single_gpu", 1), row(f"{model}_phased", gpus), row(f"{model}_dmd_sgts", gpus)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table into the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + table() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()

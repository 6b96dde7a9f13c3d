"""What each recipe costs, by its dry run: the table of docs/training.md.

    python benchmarks/cost/recipe_costs.py

The numbers are counted on the meta device from the architectures, nothing is measured.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training.config.schema import DistillConfig, load_config
from training.loop.dry_run import describe

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "training.md"
BEGIN, END = "<!-- recipe_costs.py -->\n", "<!-- end -->\n"
CONFIGS = ROOT / "training" / "configs"
GPUS = {"wan2_2_t2v_a14b": 16, "wan2_2_i2v_a14b": 16, "flux_2_dev": 16}
"""On how many GPUs recipes with full copies are described where these are not 8."""
MODELS = (
    "wan2_1_t2v_1_3b",
    "wan2_1_t2v_14b",
    "wan2_2_t2v_a14b",
    "wan2_2_i2v_a14b",
    "wan2_2_ti2v_5b",
    "wan2_2_ti2v_5b_image",
    "wan2_1_i2v_14b_480p",
    "wan2_1_flf2v_14b_720p",
    "ltx_video",
    "qwen_image",
    "qwen_image_edit",
    "qwen_image_edit_plus",
    "z_image",
    "flux_1_dev",
    "flux_1_kontext_dev",
    "stable_diffusion_3_5_medium",
    "stable_diffusion_3_5_large",
    "chroma1_hd",
    "flux_2_dev",
    "flux_2_klein_base_9b",
    "hunyuan_video_1_5_480p",
    "hunyuan_video_1_5_480p_image",
    "ltx_2",
    "ltx_2_image",
)
KINDS = ("phased_single_gpu", "phased_24gb", "phased_48gb", "phased", "phased_paper", "dmd_sgts")
SHARDED = ("phased", "phased_paper", "dmd_sgts")


def gpus_of(model: str, kind: str) -> int:
    """On how many GPUs a recipe is described."""
    return GPUS.get(model, 8) if kind in SHARDED else 1


def row(recipe: str, config: DistillConfig, gpus: int, text: str) -> str:
    """One row of the table; ``text`` is the recipe's dry run on so many GPUs."""
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
    for model in MODELS:
        for kind in KINDS:
            path, gpus = CONFIGS / f"{model}_{kind}.yaml", gpus_of(model, kind)
            if path.exists():
                config = load_config(path)
                lines.append(row(path.stem, config, gpus, describe(config, gpus=gpus)))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table into the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    made = table()  # takes minutes, in which the page may be edited
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + made + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()

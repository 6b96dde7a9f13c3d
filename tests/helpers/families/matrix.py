"""What was tested of each kind of pipeline: the table of docs/models.md.

python -m tests.helpers.families.matrix
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pdmd_core.families import FAMILIES, family
from tests.helpers.families.cases import BY_FAMILY

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- tests/helpers/families/matrix.py -->\n", "<!-- end -->\n"
_JOINED = "comfyui/test_joined_projections.py"
COMFYUI = {
    "wan": ("LoRA, full", "comfyui/test_converted_experts.py"),
    "qwen_image": ("LoRA", "comfyui/test_lora_files.py"),
    "z_image": ("LoRA, full", "comfyui/test_z_image.py"),
    "ltx_video": ("LoRA, full", "comfyui/test_ltx_video.py"),
    "ltx2": ("LoRA", _JOINED),
    **dict.fromkeys(("chroma", "flux", "flux2", "hunyuan_video_15", "stable_diffusion_3"), ("LoRA, full", _JOINED)),
}
"""What of a family's experts the real ComfyUI loads in the tests, and where."""
HEADER = (
    "| pipeline | model | recipes, dry run | velocity | distils, exports, LoRA in diffusers | resumes "
    "| full experts in diffusers | ComfyUI (family) |\n| --- | --- | --- | --- | --- | --- | --- | --- |\n"
)


def _kind(index: Mapping[str, Any], network: Mapping[str, Any]) -> tuple[object, ...]:
    """What tells kinds of pipelines apart: class, two networks, a timestep for each token, places of two images."""
    second = index.get("transformer_2") or [None, None]
    places = network.get("pos_embed_seq_len") is not None
    return index["_class_name"], second[1] is not None, bool(index.get("expand_timesteps")), places


def recipes() -> dict[tuple[object, ...], list[str]]:
    """Kind of pipeline to the models of its recipes."""
    found: dict[tuple[object, ...], list[str]] = {}
    for path in sorted((ROOT / "training" / "configs").glob("*_phased_single_gpu.yaml")):
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        index, network = (
            json.loads((ROOT / model["architecture"] / part).read_text(encoding="utf-8"))
            for part in ("model_index.json", "transformer/config.json")
        )
        index["_class_name"] = model.get("pipeline", index["_class_name"])
        found.setdefault(_kind(index, network), []).append(path.stem.removesuffix("_phased_single_gpu"))
    return found


def table() -> str:
    """A row for each case of each family."""
    known, rows = recipes(), []
    for name in FAMILIES:
        for case_name, case in BY_FAMILY[name].items():
            pipeline = case.build()
            components = {key: [None, type(value).__name__] for key, value in pipeline.components.items() if value}
            index = {**pipeline.config, "_class_name": type(pipeline).__name__, **components}
            own = known.get(_kind(index, pipeline.transformer.config), [])
            cells = [
                f"`{type(pipeline).__name__}`",
                f"{family(name).title} (`{case_name}`)",
                ", ".join(f"`{model}`" for model in own) or "none",
                *["yes"] * 4,
                COMFYUI.get(name, ("not tested", ""))[0],
            ]
            rows.append(f"| {' | '.join(cells)} |\n")
    return HEADER + "".join(rows)


def main() -> None:
    """Write the table into the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()

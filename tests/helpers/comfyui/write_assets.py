"""Write what is made from the nodes: ``workflows/`` with thumbnails, and the English ``locales``.

    .comfyui/venv/bin/python -m tests.helpers.comfyui.write_assets

A test compares the committed files with what this would write.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.comfyui import install
from tests.helpers.comfyui.example_workflows import WORKFLOWS
from tests.helpers.comfyui.graphs import Graph
from tests.helpers.comfyui.server import REPOSITORY, make_base, running

THUMBNAIL = (480, 300)


def workflow_text(info: dict[str, Any], name: str) -> str:
    """The JSON of one example workflow."""
    graph = Graph(info)
    WORKFLOWS[name][0](graph)
    return json.dumps(graph.to_json(), indent=2) + "\n"


def english_text(info: dict[str, Any]) -> str:
    """The words of our nodes, as the front end's translation file."""
    words = {}
    for name, entry in info.items():
        if not name.startswith("PhasedDMD"):
            continue
        sockets = {**entry["input"].get("required", {}), **entry["input"].get("optional", {})}
        words[name] = {
            "display_name": entry["display_name"],
            "description": entry["description"],
            "inputs": {key: {"name": key, "tooltip": spec[1]["tooltip"]} for key, spec in sockets.items()},
            "outputs": {
                str(slot): {"name": title, "tooltip": tip}
                for slot, (title, tip) in enumerate(zip(entry["output_name"], entry["output_tooltips"], strict=True))
            },
        }
    return json.dumps(words, indent=2) + "\n"


def thumbnail(name: str, path: Path) -> None:
    """The plan of the workflow under its title."""
    import importlib.util
    import sys

    from PIL import Image, ImageDraw, ImageFont

    spec = importlib.util.spec_from_file_location("phased_dmd_pack", REPOSITORY / "__init__.py")
    assert spec and spec.loader
    sys.modules["phased_dmd_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["phased_dmd_pack"])
    timeline = importlib.import_module("phased_dmd_pack.comfy_nodes.timeline")
    _, steps, shift = WORKFLOWS[name]
    drawn = timeline.draw(timeline.PhasePlan.from_steps(steps, shift=shift)).crop((0, 0, 1600, 180))
    picture = Image.new("RGB", THUMBNAIL, "#1f2227")
    drawn.thumbnail((THUMBNAIL[0], 120))
    picture.paste(drawn, (0, 150))
    title = name.removeprefix("phased_").replace("_", " ")
    ImageDraw.Draw(picture).text((THUMBNAIL[0] / 2, 75), title, "#f2f2f2", ImageFont.load_default(30), anchor="mm")
    picture.save(path, quality=85)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base")
        with running(install.tree(install.NEWEST), base) as server:
            info = server.get("/object_info")
    (REPOSITORY / "locales/en").mkdir(parents=True, exist_ok=True)
    (REPOSITORY / "locales/en/nodeDefs.json").write_text(english_text(info), encoding="utf-8")
    (REPOSITORY / "workflows").mkdir(exist_ok=True)
    for name in WORKFLOWS:
        (REPOSITORY / f"workflows/{name}.json").write_text(workflow_text(info, name), encoding="utf-8")
        thumbnail(name, REPOSITORY / f"workflows/{name}.jpg")


if __name__ == "__main__":
    main()

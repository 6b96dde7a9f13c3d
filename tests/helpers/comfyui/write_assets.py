"""Write what is made from the nodes: ``workflows/`` with thumbnails, ``subgraphs/``, and the English ``locales``.

    .comfyui/venv/bin/python -m tests.helpers.comfyui.write_assets

A test compares the committed files with what this would write.
"""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from tests.comfyui import install
from tests.helpers.comfyui.blueprints import BLUEPRINTS
from tests.helpers.comfyui.browser import FrontEnd, front_end, workflow
from tests.helpers.comfyui.example_workflows import WORKFLOWS
from tests.helpers.comfyui.graphs import Graph
from tests.helpers.comfyui.server import REPOSITORY, Server, make_base, make_named_files, running

THUMBNAIL = (480, 300)
RUNS_ANYWHERE = "phased_tiny_on_cpu"
"""The workflow of which all models are in the repository."""


def workflow_text(info: dict[str, Any], name: str) -> str:
    """The JSON of one example workflow."""
    graph = Graph(info)
    WORKFLOWS[name][0](graph)
    return json.dumps(graph.to_json(), indent=2) + "\n"


def blueprint_text(info: dict[str, Any], name: str) -> str:
    """The JSON of one blueprint."""
    return json.dumps(BLUEPRINTS[name](info), indent=2) + "\n"


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


def thumbnail(name: str, path: Path, graph: Image.Image, painted: Sequence[Image.Image] = ()) -> None:
    """The title, the pictures that the workflow painted or else its graph, and its plan."""
    spec = importlib.util.spec_from_file_location("phased_dmd_pack", REPOSITORY / "__init__.py")
    assert spec and spec.loader
    sys.modules["phased_dmd_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["phased_dmd_pack"])
    timeline = importlib.import_module("phased_dmd_pack.comfy_nodes.timeline")
    plan = timeline.PhasePlan.from_json(WORKFLOWS[name][1].to_json())
    drawn = timeline.draw(plan).crop((0, 0, 1600, 180))
    drawn.thumbnail((THUMBNAIL[0], 60))
    picture = Image.new("RGB", THUMBNAIL, "#1f2227")
    picture.paste(drawn, ((THUMBNAIL[0] - drawn.width) // 2, THUMBNAIL[1] - drawn.height))
    title = name.removeprefix("phased_").replace("_", " ")
    ImageDraw.Draw(picture).text((THUMBNAIL[0] / 2, 24), title, "#f2f2f2", ImageFont.load_default(26), anchor="mm")
    if painted:
        edge = THUMBNAIL[0] // len(painted)
        for k, each in enumerate(painted):
            picture.paste(each.resize((edge - 8, edge - 8), Image.Resampling.NEAREST), (k * edge + 4, 84))
    else:
        graph = graph.copy()
        graph.thumbnail((THUMBNAIL[0] - 16, 180), Image.Resampling.LANCZOS)
        picture.paste(graph, ((THUMBNAIL[0] - graph.width) // 2, 48 + (180 - graph.height) // 2))
    picture.save(path, quality=85)


def drawn_graph(ui: FrontEnd, name: str) -> Image.Image:
    """A workflow as the front end draws it."""
    ui.load(workflow(name), name)
    ui.page.wait_for_timeout(1000)
    ui.close_dialogs()
    ui.fit()
    return ui.graph_picture()


def painted_by(server: Server, info: dict[str, Any], name: str) -> list[Image.Image]:
    """The pictures that a workflow saves."""
    graph = Graph(info)
    WORKFLOWS[name][0](graph)
    images = [image for output in server.run(graph.prompt).values() for image in output.get("images", [])]
    saved = [image for image in images if image["type"] == "output"]
    return [Image.open(io.BytesIO(server.picture(image))).convert("RGB") for image in saved]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base")
        with running(install.tree(install.NEWEST), base) as server:
            info = server.get("/object_info")
            for kind, names, write in (
                ("workflows", WORKFLOWS, workflow_text),
                ("subgraphs", BLUEPRINTS, blueprint_text),
            ):
                (REPOSITORY / kind).mkdir(exist_ok=True)
                for name in names:
                    (REPOSITORY / f"{kind}/{name}.json").write_text(write(info, name), encoding="utf-8")
            painted = painted_by(server, info, RUNS_ANYWHERE)
            make_named_files(base)
            with front_end(server.url) as ui:
                ui.page.set_viewport_size({"width": 2600, "height": 1500})
                graphs = {name: drawn_graph(ui, name) for name in WORKFLOWS}
    (REPOSITORY / "locales/en").mkdir(parents=True, exist_ok=True)
    (REPOSITORY / "locales/en/nodeDefs.json").write_text(english_text(info), encoding="utf-8")
    for name in WORKFLOWS:
        path = REPOSITORY / f"workflows/{name}.jpg"
        thumbnail(name, path, graphs[name], painted if name == RUNS_ANYWHERE else ())


if __name__ == "__main__":
    main()

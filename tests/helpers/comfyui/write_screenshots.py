"""Write the screenshots of the documentation, ``docs/comfyui/``, in both front ends and both languages.

    .comfyui/venv/bin/python -m tests.helpers.comfyui.write_screenshots

Chinese needs a font that has it, such as Debian's fonts-wqy-microhei.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from tests.comfyui import install
from tests.helpers.comfyui.browser import FrontEnd, front_end, workflow
from tests.helpers.comfyui.server import REPOSITORY, make_base, make_named_files, running

FOLDER = REPOSITORY / "docs/comfyui"
WIDE, HIGH = 2600, 1400
"""The window: large enough for a whole template with its words."""
WIDTH = 1600
"""Of a written picture."""
FRONT_ENDS = {"classic": False, "nodes_2": True}


def take(ui: FrontEnd, name: str) -> None:
    """The whole graph as it is now."""
    ui.fit()
    ui.page.wait_for_timeout(500)
    picture = ui.graph_picture()
    picture.thumbnail((WIDTH, picture.height), Image.Resampling.LANCZOS)
    picture.save(FOLDER / f"{name}.jpg", quality=82)


def take_node(ui: FrontEnd, node: int, name: str) -> None:
    """One node, large."""
    ui.fit()
    clip = ui.do(
        """(id) => {
            const canvas = window.app.canvas, node = window.app.graph.getNodeById(id);
            canvas.ds.scale = 1.5;
            canvas.ds.offset = [120 - node.pos[0], 120 - node.pos[1]];
            canvas.setDirty(true, true);
            const seen = canvas.canvas.getBoundingClientRect(), at = (k) => (node.pos[k] + canvas.ds.offset[k]) * 1.5;
            const [x, y] = [seen.left + at(0) - 12, seen.top + at(1) - 57];
            const height = Math.min(node.size[1] * 1.5 + 69, window.innerHeight - y);
            return { x, y, width: node.size[0] * 1.5 + 24, height };
        }""",
        node,
    )
    ui.page.wait_for_timeout(1000)
    ui.page.screenshot(path=FOLDER / f"{name}.jpg", type="jpeg", quality=82, clip=clip)


def run(ui: FrontEnd) -> None:
    """Queue the graph and wait until it has run and the messages about it are gone."""
    ui.do(
        """() => new Promise((done) => {
            window.app.api.addEventListener("execution_success", done, { once: true });
            window.app.queuePrompt(0, 1);
        })"""
    )
    ui.page.wait_for_timeout(4000)


def tiny(ui: FrontEnd, **widgets: float) -> None:
    """The tiny template after a run with these widgets on its sampler; each run is one that the cache does not have."""
    ui.load(workflow("phased_tiny_on_cpu"))
    ui.close_dialogs()
    sampler = ui.node("PhasedDMDSampler")
    for name, value in widgets.items():
        ui.set_widget(sampler, name, value)
    run(ui)


def templates(ui: FrontEnd) -> None:
    for name, on in FRONT_ENDS.items():
        ui.use_nodes_2(on)
        ui.load(workflow("phased_wan22_t2v"))
        ui.close_dialogs()
        ui.cells(ui.node("PhasedDMDSampler"), 4)
        take(ui, f"time_line_{name}")
        sampler = ui.node("PhasedDMDSampler")
        ui.set_widget(sampler, "denoise", 0.1)
        ui.cells(sampler, 8)
        take_node(ui, sampler, f"denoise_{name}")
    ui.use_nodes_2(False)
    tiny(ui, seed=1)
    take(ui, "tiny_on_cpu")
    ui.load(workflow("phased_wan22_undistilled_first_step"))
    ui.close_dialogs()
    ui.cells(ui.node("PhasedDMDSampler"), 4)
    take(ui, "undistilled_first_step")
    ui.load(json.loads(next((REPOSITORY / "subgraphs").glob("*.json")).read_text(encoding="utf-8")))
    ui.close_dialogs()
    ui.do("() => window.app.canvas.setGraph(window.app.graph._nodes[0].subgraph)")
    ui.page.wait_for_timeout(1500)
    take(ui, "blueprint")


def chinese(ui: FrontEnd) -> None:
    ui.do("() => window.app.extensionManager.setting.set('Comfy.Locale', 'zh')")
    ui.reload()
    for name, on in FRONT_ENDS.items():
        ui.use_nodes_2(on)
        tiny(ui, seed=21 + on, steps=8)
        take(ui, f"chinese_{name}")


def main() -> None:
    if not subprocess.run(["fc-list", ":lang=zh"], capture_output=True, check=True).stdout:
        raise SystemExit("no font has Chinese: install one, such as fonts-wqy-microhei")
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base")
        make_named_files(base)
        with running(install.tree(install.NEWEST), base) as server, front_end(server.url) as ui:
            ui.page.set_viewport_size({"width": WIDE, "height": HIGH})
            templates(ui)
            chinese(ui)


if __name__ == "__main__":
    main()

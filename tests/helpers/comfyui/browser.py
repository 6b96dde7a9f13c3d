"""Chromium on the real front end."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tests.comfyui import install
from tests.helpers.comfyui.server import PATIENCE, REPOSITORY

ARTEFACTS = REPOSITORY / "runs/comfyui"
"""Screenshots of the last run."""
SOON = 120
"""Seconds in which a page has changed, on a busy machine."""
_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
_ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
_READY = "() => window.app?.graph && window.app.extensionManager && document.querySelector('canvas')"


@dataclass
class FrontEnd:
    """One open page; ``errors`` collects exceptions of its scripts and console errors about our files."""

    page: Page
    errors: list[str] = field(default_factory=list)

    def do(self, script: str, argument: Any = None) -> Any:
        return self.page.evaluate(script, argument)

    def load(self, workflow: dict[str, Any], name: str = "test") -> None:
        """As opening the file does."""
        self.do("([workflow, name]) => window.app.loadGraphData(workflow, true, true, name)", [workflow, name])
        self.page.wait_for_timeout(300)

    def close_dialogs(self) -> None:
        for _ in range(3):
            self.page.keyboard.press("Escape")
            self.page.wait_for_timeout(100)

    def node(self, kind: str) -> int:
        """The id of the one node of this type."""
        return self.do("kind => window.app.graph._nodes.find((node) => node.type === kind).id", kind)

    def set_widget(self, node: int, name: str, value: Any) -> None:
        """As a user's edit does: the value, then the widget's callback."""
        self.do(
            """([id, name, value]) => {
                const node = window.app.graph.getNodeById(id);
                const widget = node.widgets.find((widget) => widget.name === name);
                widget.value = value;
                widget.callback?.(value, window.app.canvas, node);
            }""",
            [node, name, value],
        )

    def timeline(self, node: int) -> dict[str, Any]:
        """What the time line on a node shows: cells, names, texts and those that are cut off, error, and its size."""
        return self.do(
            """(id) => {
                const box = window.app.graph.getNodeById(id).phasedTimeline;
                const all = (kind) => [...box.querySelectorAll(kind)];
                const seen = box.getBoundingClientRect();
                const outside = (text) => {
                    const {left, right, top, bottom} = text.getBoundingClientRect();
                    return left < seen.left - 1 || right > seen.right + 1
                        || top < seen.top - 1 || bottom > seen.bottom + 1;
                };
                const texts = all("text");
                return {
                    names: all("text.name").map((text) => text.textContent),
                    sigmas: all("text.sigma").map((text) => text.textContent),
                    cfgs: all("text.cfg").map((text) => text.textContent),
                    summary: box.querySelector("text.summary")?.firstChild?.textContent ?? null,
                    cut_off: texts.filter(outside).map((text) => text.textContent),
                    widths: all("rect.step").map((cell) => Number(cell.getAttribute("width"))),
                    skipped: all("rect.step").filter((cell) => cell.getAttribute("fill-opacity") !== "1").length,
                    handles: all("rect.boundary").length,
                    error: box.querySelector(".phased-dmd-error")?.textContent ?? null,
                    shown: seen.width > 0 && seen.height > 0,
                };
            }""",
            node,
        )

    def cells(self, node: int, count: int) -> None:
        """Wait until the time line on a node has this number of cells."""
        self.wait(
            "([id, n]) => window.app.graph.getNodeById(id).phasedTimeline?.querySelectorAll('rect.step').length === n",
            [node, count],
        )

    def reload(self) -> None:
        """Load the page anew, as after another language was chosen."""
        self.page.reload(wait_until="domcontentloaded")
        self.wait(_READY)
        self.page.wait_for_timeout(2000)

    def use_nodes_2(self, on: bool) -> None:
        """Switch between the classic canvas and Nodes 2.0."""
        self.do("(on) => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", on)
        self.page.wait_for_timeout(500)

    def wait(self, condition: str, argument: Any = None) -> None:
        self.page.wait_for_function(condition, arg=argument, timeout=SOON * 1000)

    def fit(self) -> None:
        """The whole graph in view."""
        self.do("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.page.wait_for_timeout(800)

    def graph_picture(self) -> Image.Image:
        """The graph that is open, as it is on the canvas, and a little around it."""
        left, top, right, bottom = self.do(
            """() => {
                const {ds, canvas, graph} = window.app.canvas, at = canvas.getBoundingClientRect();
                const boxes = [...graph._nodes, ...graph._groups].map(({pos, size}) =>
                    [pos[0], pos[1] - 30, pos[0] + size[0], pos[1] + size[1]]);
                for (const end of [graph.inputNode, graph.outputNode]) {
                    const [x, y, width, height] = end?.boundingRect ?? [];
                    if (end) boxes.push([x, y, x + width, y + height]);
                }
                const edge = (k, most) => most(...boxes.map((box) => box[k]));
                const screen = (...place) => place.map((each, k) =>
                    [at.left, at.top][k] + (each + ds.offset[k]) * ds.scale);
                return [...screen(edge(0, Math.min) - 20, edge(1, Math.min) - 20),
                    ...screen(edge(2, Math.max) + 20, edge(3, Math.max) + 20)];
            }"""
        )
        clip = {"x": max(left, 0), "y": max(top, 0), "width": right - left, "height": bottom - top}
        return Image.open(io.BytesIO(self.page.screenshot(clip=clip))).convert("RGB")

    def screenshot(self, name: str) -> Path:
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        path = ARTEFACTS / f"{name}.png"
        self.page.screenshot(path=path)
        return path


@contextlib.contextmanager
def front_end(url: str) -> Iterator[FrontEnd]:
    """Start a browser and open the front end of a server."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=install.chromium(), headless=True, args=_ARGUMENTS)
        try:
            with fresh_page(browser, url) as opened:
                yield opened
        finally:
            browser.close()


@contextlib.contextmanager
def fresh_page(browser: Browser, url: str, without: str | None = None) -> Iterator[FrontEnd]:
    """The front end in a profile of its own. without: pattern of URLs that cannot be reached."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    try:
        context.set_default_timeout(PATIENCE * 1000)
        if without:
            context.route(without, lambda route: route.abort())
        opened = FrontEnd(context.new_page())
        opened.page.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.page.on("console", lambda message: _collect(opened, message))
        opened.page.goto(url, wait_until="domcontentloaded")
        opened.wait(_READY)
        opened.do("() => window.app.extensionManager.setting?.set('Comfy.Minimap.Visible', false)")
        opened.page.wait_for_timeout(2000)
        opened.close_dialogs()
        yield opened
    finally:
        context.close()


def _collect(opened: FrontEnd, message: Any) -> None:
    """Console errors that name us; the front end has noise of its own."""
    if message.type == "error" and any(word in message.text.lower() for word in ("phased", "missing node")):
        opened.errors.append(message.text)


def workflow(name: str) -> dict[str, Any]:
    return json.loads((REPOSITORY / f"workflows/{name}.json").read_text())

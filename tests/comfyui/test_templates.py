"""Templates in the real front end: each opens, is laid out, names its missing models; the browser of templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.comfyui.browser import FrontEnd, fresh_page, front_end, workflow
from tests.helpers.comfyui.example_workflows import WORKFLOWS
from tests.helpers.comfyui.server import Server


@pytest.fixture(scope="module")
def browser(server: Server):
    with front_end(server.url) as opened:
        yield opened


@pytest.fixture
def ui(browser: FrontEnd) -> FrontEnd:
    browser.errors.clear()
    browser.close_dialogs()
    return browser


LAYOUT = """() => {
    const {_nodes: nodes, _groups: groups, links} = window.app.graph, found = {backward: [], overlapping: []};
    found["in no group"] = [];
    for (const link of links.values ? links.values() : Object.values(links)) {
        const [from, to] = [link.origin_id, link.target_id].map((id) => window.app.graph.getNodeById(id));
        if (from.pos[0] + from.size[0] > to.pos[0]) found.backward.push(`${from.type} to ${to.type}`);
    }
    const box = (node) => [node.pos[0], node.pos[1] - 30, node.pos[0] + node.size[0], node.pos[1] + node.size[1]];
    nodes.forEach((node, k) => {
        const [left, top, right, bottom] = box(node);
        for (const other of nodes.slice(k + 1)) {
            const [a, b, c, d] = box(other);
            const apart = left >= c || a >= right || top >= d || b >= bottom;
            if (!apart) found.overlapping.push(`${node.type} and ${other.type}`);
        }
        const around = ({pos, size}) => pos[0] <= left && pos[1] <= top && pos[0] + size[0] >= right
            && pos[1] + size[1] >= bottom;
        if (node.type !== "MarkdownNote" && !groups.some(around)) found["in no group"].push(node.type);
    });
    return found;
}"""


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_template_opens_without_errors(ui: FrontEnd, name: str) -> None:
    expected = workflow(name)
    ui.load(expected, name)
    ui.page.wait_for_timeout(700)
    found = ui.do(
        """() => window.app.graph._nodes.map((node) => ({
            type: node.type,
            broken: Boolean(node.has_errors),
            registered: node.type in LiteGraph.registered_node_types,
            values: node.widgets_values ?? [],
            links: (node.inputs ?? []).filter((input) => input.link !== null && !input.widget).length,
        }))"""
    )
    assert sorted(each["type"] for each in found) == sorted(node["type"] for node in expected["nodes"])
    assert all(each["registered"] and not each["broken"] for each in found)
    assert sum(each["links"] for each in found) == len(expected["links"])
    _widgets_kept_their_values(ui, expected)
    assert ui.do(LAYOUT) == {"backward": [], "overlapping": [], "in no group": []}
    ui.close_dialogs()
    ui.fit()
    ui.screenshot(f"template_{name}")
    assert ui.errors == []


def _widgets_kept_their_values(ui: FrontEnd, expected: dict[str, Any]) -> None:
    for node in expected["nodes"]:
        if node["type"].startswith("PhasedDMD"):
            values = ui.do(
                """(id) => window.app.graph.getNodeById(id).widgets
                    .filter((widget) => widget.serialize !== false)
                    .map((widget) => widget.value)""",
                node["id"],
            )
            assert values[: len(node["widgets_values"])] == node["widgets_values"], node["type"]


def test_the_templates_are_offered_to_users(ui: FrontEnd, server: Server) -> None:
    offered = server.get("/workflow_templates")
    assert set(offered["phased-dmd"]) == set(WORKFLOWS)
    for name in WORKFLOWS:
        assert server.get(f"/api/workflow_templates/phased-dmd/{name}.jpg")[:2] == b"\xff\xd8"


def test_the_template_that_runs_anywhere_is_first_in_the_browser_of_templates(ui: FrontEnd) -> None:
    ui.do("() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    ui.page.get_by_text("phased-dmd").first.click()
    ui.page.get_by_text("phased_tiny_on_cpu").first.wait_for()
    ui.page.wait_for_timeout(1000)
    shown = ui.page.locator("[role=dialog]").last.inner_text().splitlines()
    shown = [*dict.fromkeys(line for line in shown if line in WORKFLOWS)]
    ui.screenshot("browse_templates")
    ui.close_dialogs()
    assert shown[0] == "phased_tiny_on_cpu" and len(set(shown)) > 3
    assert shown[1:] == sorted(shown[1:])


def test_missing_models_have_red_rings_and_downloads(browser: FrontEnd, server: Server) -> None:
    names = ["phased_qwen_image_lightning", "phased_ltx2_distilled"]
    asking = {name: [node for node in workflow(name)["nodes"] if node["properties"].get("models")] for name in names}
    models = {
        name: {(each["directory"], each["name"]) for node in nodes for each in node["properties"]["models"]}
        for name, nodes in asking.items()
    }
    files = [server.base / "models" / Path(*each) for found in models.values() for each in found]
    for file in files:
        file.unlink()
    try:
        with fresh_page(browser.page.context.browser, server.url) as plain:
            for name in names:
                plain.load(workflow(name), name)
                plain.page.get_by_text("View details").first.click()
                for _, file in models[name]:
                    plain.page.get_by_text(file).first.wait_for()
                ringed = plain.do("() => window.app.graph._nodes.filter((n) => n.has_errors).map((n) => Number(n.id))")
                assert sorted(ringed) == sorted(node["id"] for node in asking[name])
                plain.page.get_by_text("Download all", exact=True).wait_for()
                assert plain.page.get_by_text("Download", exact=True).count() == len(models[name])
                plain.fit()
                plain.screenshot(f"missing_{name}")
            plain.do("() => window.app.extensionManager.setting.set('Comfy.RightSidePanel.IsOpen', false)")
    finally:
        for file in files:
            file.touch()

"""The real front end in a real browser: templates, widgets, time lines, a picture."""

from __future__ import annotations

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


def test_the_time_line_follows_the_widgets(ui: FrontEnd) -> None:
    ui.load(workflow("phased_wan22_t2v"))
    ui.close_dialogs()
    plan = ui.node("PhasedDMDPlanFromSteps")
    ui.wait("(id) => window.app.graph.getNodeById(id).phasedTimeline?.querySelectorAll('rect').length === 2", plan)
    shown = ui.timeline(plan)
    assert shown["bands"] == ["high_noise: 1.0000, 0.9375", "low_noise: 0.8333, 0.6250"]
    assert shown["steps"] == 4 and shown["error"] is None
    assert shown["texts"] == ["high_noise", "low_noise", "1.000", "0.938", "0.833", "0.625"]
    assert shown["cut_off"] == []
    ui.set_widget(plan, "steps", "1, 1, 2")
    ui.wait("(id) => window.app.graph.getNodeById(id).phasedTimeline.querySelectorAll('rect').length === 3", plan)
    before = ui.timeline(plan)["widths"]
    ui.set_widget(plan, "shift", 1.0)
    ui.wait(
        "([id, width]) => window.app.graph.getNodeById(id).phasedTimeline.querySelector('rect').getAttribute('width')"
        " != width",
        [plan, str(before[0])],
    )
    assert ui.timeline(plan)["bands"][0] == "high_noise: 1.0000"
    ui.set_widget(plan, "steps", "two")
    ui.wait("(id) => window.app.graph.getNodeById(id).phasedTimeline.querySelector('.phased-dmd-error')", plan)
    assert "steps are whole numbers" in ui.timeline(plan)["error"]
    assert ui.errors == []


def test_a_saved_graph_has_no_trace_of_the_time_line(ui: FrontEnd) -> None:
    ui.load(workflow("phased_wan22_t2v"))
    ui.close_dialogs()
    plan = ui.node("PhasedDMDPlanFromSteps")
    saved = ui.do("() => window.app.graph.serialize()")
    node = next(node for node in saved["nodes"] if node["type"] == "PhasedDMDPlanFromSteps")
    assert node["widgets_values"] == ["2, 2", 5, ""]
    prompt = ui.do("async () => (await window.app.graphToPrompt()).output")
    assert set(prompt[str(plan)]["inputs"]) == {"steps", "shift", "names"}


def test_a_user_opens_the_tiny_template_moves_a_widget_and_sees_the_picture(ui: FrontEnd, server: Server) -> None:
    ui.load(workflow("phased_tiny_on_cpu"), "phased_tiny_on_cpu")
    ui.close_dialogs()
    sampler, saved, report = (ui.node(kind) for kind in ("PhasedDMDSampler", "SaveImage", "PhasedDMDPlanReport"))
    ui.set_widget(sampler, "seed", 123)
    ui.do("() => window.app.queuePrompt(0, 1)")
    ui.wait(
        "(ids) => ids.every((id) => window.app.graph.getNodeById(id).imgs?.[0]?.naturalWidth > 0)",
        [saved, report],
    )
    shown = ui.do(
        "([image, report]) => [image, report].map((id) => window.app.graph.getNodeById(id).imgs[0].naturalWidth)",
        [saved, report],
    )
    assert shown == [256, 960]
    for node in (sampler, ui.node("PhasedDMDLoadExperts")):
        ui.wait("(id) => window.app.graph.getNodeById(id).phasedTimeline.querySelectorAll('rect').length === 2", node)
        assert ui.timeline(node)["bands"][0] == "high_noise, cfg 1: 1.0000, 0.9375"
    for steps, text in ((7, "7 step(s) here, 4 trained"), (0, "these are trained sigmas")):
        ui.set_widget(sampler, "steps", steps)
        ui.do("() => window.app.queuePrompt(0, 1)")
        ui.wait(
            "([id, text]) => window.app.graph.getNodeById(id).widgets.some((w) => `${w.value}`.includes(text))",
            [sampler, text],
        )
    ui.fit()
    ui.screenshot("tiny_on_cpu")
    history = server.get("/history")
    assert any(prompt["prompt"][2][str(sampler)]["inputs"]["seed"] == 123 for prompt in history.values())
    assert ui.errors == []


def test_the_help_of_a_node_is_shown(ui: FrontEnd) -> None:
    ui.load(workflow("phased_tiny_on_cpu"))
    ui.close_dialogs()
    asked: list[str] = []
    ui.page.on("response", lambda answer: asked.append(f"{answer.status} {answer.url}"))
    ui.do(
        "(id) => { const node = window.app.graph.getNodeById(id); window.app.canvas.selectNode(node); }",
        ui.node("PhasedDMDSampler"),
    )
    ui.page.wait_for_timeout(500)
    ui.page.locator("[data-testid=info-button], [data-testid=selection-toolbox-info]").first.click()
    ui.page.get_by_text("there is no scheduler to choose").first.wait_for()
    assert any("200" in each and "docs/PhasedDMDSampler" in each for each in asked), asked
    ui.screenshot("help")


def test_nodes_work_without_the_front_end_extension(browser: FrontEnd, server: Server) -> None:
    with fresh_page(browser.page.context.browser, server.url, without="**/extensions/phased-dmd/*.js") as plain:
        plain.load(workflow("phased_tiny_on_cpu"))
        plain.close_dialogs()
        assert (
            plain.do("(id) => window.app.graph.getNodeById(id).phasedTimeline ?? null", plain.node("PhasedDMDSampler"))
            is None
        )
        saved = plain.node("SaveImage")
        plain.do("() => window.app.queuePrompt(0, 1)")
        plain.wait("(id) => window.app.graph.getNodeById(id).imgs?.[0]?.naturalWidth === 256", saved)

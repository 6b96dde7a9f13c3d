"""The real front end in a real browser: widgets, time lines, a picture."""

from __future__ import annotations

import time

import pytest

from tests.helpers.comfyui.browser import SOON, FrontEnd, fresh_page, front_end, workflow
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


@pytest.fixture(params=[False, True], ids=["classic canvas", "Nodes 2.0"])
def both(request: pytest.FixtureRequest, ui: FrontEnd):
    ui.use_nodes_2(request.param)
    yield ui, "nodes2" if request.param else "classic"
    ui.use_nodes_2(False)


def test_the_time_line_is_there_before_a_run_and_follows_widgets_links_and_drags(both) -> None:
    ui, front_end = both
    ui.load(workflow("phased_wan22_t2v"))
    ui.close_dialogs()
    plan, experts, sampler, report = (
        ui.node(f"PhasedDMD{kind}") for kind in ("PlanFromSteps", "Experts", "Sampler", "PlanReport")
    )
    for node in (plan, experts, sampler, report):
        ui.cells(node, 4)
        shown = ui.timeline(node)
        assert shown["names"] == ["high_noise", "low_noise"] and shown["error"] is None and shown["shown"]
        assert shown["sigmas"] == ["1.0000", "0.9375", "0.8333", "0.6250"]
        assert len(set(shown["widths"])) == 1 and shown["cut_off"] == []
        assert shown["summary"] == "4 steps, shift 5, trained sigmas"
        assert shown["handles"] == (node == plan)
    assert ui.timeline(sampler)["cfgs"] == ui.timeline(experts)["cfgs"] == ["cfg 1"] * 2
    assert "step 3  low_noise  sigma 0.8333" in ui.do(
        "(id) => window.app.graph.getNodeById(id).phasedText.innerText", report
    )
    ui.fit()
    ui.screenshot(f"timeline_{front_end}")
    ui.set_widget(sampler, "denoise", 0.5)
    ui.set_widget(experts, "cfg", "3.5, 2 | 1")
    ui.wait(
        "(id) => window.app.graph.getNodeById(id).phasedTimeline.querySelectorAll('text.cfg').length === 3", sampler
    )
    shown = ui.timeline(sampler)
    assert shown["skipped"] == 2 and shown["cfgs"] == ["cfg 3.5", "cfg 2", "cfg 1"]
    assert shown["summary"] == "2 steps, denoise starts at 0.5, trained sigmas"
    ui.set_widget(sampler, "denoise", 0.1)
    ui.cells(sampler, 8)
    shown = ui.timeline(sampler)
    assert shown["summary"] == "denoise 0.125 is between trained steps, 0.25 is at one" and shown["cut_off"] == []
    assert shown["skipped"] == 7
    ui.set_widget(sampler, "denoise", 0.5)
    ui.set_widget(plan, "steps", "1, 1, 2")
    ui.wait("(id) => window.app.graph.getNodeById(id).phasedTimeline.querySelectorAll('text.name').length === 3", plan)
    ui.wait("(id) => window.app.graph.getNodeById(id).phasedTimeline.querySelector('.phased-dmd-error')", experts)
    assert "cfg with | has one number for each step" in ui.timeline(experts)["error"]
    ui.set_widget(plan, "steps", "two")
    ui.wait("(id) => window.app.graph.getNodeById(id).phasedTimeline.querySelector('.phased-dmd-error')", plan)
    assert "steps are whole numbers" in ui.timeline(plan)["error"]
    assert ui.do("(id) => window.app.graph.getNodeById(id).phasedText.innerText", report) == ""  # of no plan
    ui.set_widget(plan, "steps", "2, 2")
    ui.set_widget(experts, "cfg", "1")
    ui.cells(sampler, 4)
    _drag_the_boundary(ui, plan, -1)
    assert ui.do("(id) => window.app.graph.getNodeById(id).widgets[0].value", plan) == "1, 3"
    ui.cells(sampler, 4)
    assert ui.errors == []


def _drag_the_boundary(ui: FrontEnd, node: int, steps: int) -> None:
    box = ui.do(
        """(id) => {
            const node = window.app.graph.getNodeById(id);
            window.app.canvas.ds.scale = 1;
            window.app.canvas.centerOnNode?.(node);
            window.app.canvas.setDirty(true, true);
        }""",
        node,
    )
    ui.page.wait_for_timeout(600)
    box = ui.do(
        """(id) => {
            const box = window.app.graph.getNodeById(id).phasedTimeline;
            const {x, y, width, height} = box.querySelector("rect.boundary").getBoundingClientRect();
            return [x + width / 2, y + height / 2, box.querySelector("rect.step").getBoundingClientRect().width];
        }""",
        node,
    )
    ui.page.mouse.move(box[0], box[1])
    ui.page.mouse.down()
    ui.page.mouse.move(box[0] + steps * box[2], box[1], steps=4)
    ui.page.mouse.up()
    ui.page.wait_for_timeout(400)


def test_values_from_other_nodes_are_followed_or_said(ui: FrontEnd) -> None:
    ui.load(workflow("phased_wan22_t2v"))
    ui.close_dialogs()
    plan = ui.node("PhasedDMDPlanFromSteps")
    ui.do(
        """(id) => {
            const graph = window.app.graph, node = graph.getNodeById(id);
            const number = LiteGraph.createNode("PrimitiveFloat");
            graph.add(number);
            number.widgets[0].value = 8;
            number.connect(0, node, node.inputs.findIndex((input) => input.name === "shift"));
        }""",
        plan,
    )
    ui.wait("(id) => window.app.graph.getNodeById(id).phasedTimeline.textContent.includes('shift 8')", plan)
    experts = ui.node("PhasedDMDExperts")
    ui.do(
        """(id) => {
            const graph = window.app.graph, node = graph.getNodeById(id);
            const number = graph.nodes.find((each) => each.type === "PrimitiveFloat");
            number.connect(0, node, node.inputs.findIndex((input) => input.name === "cfg"));
        }""",
        experts,
    )
    ui.wait("(id) => window.app.graph.getNodeById(id).phasedTimeline.textContent.includes('cfg 8')", experts)
    prompt = ui.do("async () => (await window.app.graphToPrompt()).output")
    assert isinstance(prompt[str(experts)]["inputs"]["cfg"], list)
    report = ui.node("PhasedDMDPlanReport")
    for kind, text in (("PhasedDMDSigmas", "step 4  low_noise"), ("BasicScheduler", "other nodes compute sigmas")):
        ui.do(
            """([kind, report, plan]) => {
                const graph = window.app.graph, node = graph.getNodeById(report), sigmas = LiteGraph.createNode(kind);
                graph.add(sigmas);
                const from = kind === "PhasedDMDSigmas" ? graph.getNodeById(plan) : null;
                from?.connect(0, sigmas, sigmas.inputs.findIndex((input) => input.name === "plan"));
                sigmas.connect(0, node, node.inputs.findIndex((input) => input.name === "sigmas"));
            }""",
            [kind, report, plan],
        )
        shown = "[node.phasedText, node.phasedTimeline].some((box) => box.innerText.includes(text))"
        ui.wait(f"([id, text]) => {{ const node = window.app.graph.getNodeById(id); return {shown}; }}", [report, text])
    ui.do(
        """(id) => {
            const graph = window.app.graph, node = graph.getNodeById(id);
            const text = LiteGraph.createNode("StringConcatenate");
            graph.add(text);
            text.connect(0, node, node.inputs.findIndex((input) => input.name === "steps"));
        }""",
        plan,
    )
    ui.wait("(id) => window.app.graph.getNodeById(id).phasedTimeline.textContent.includes('shown after a run')", plan)
    assert "other nodes compute steps" in ui.timeline(plan)["error"]


def test_time_lines_see_through_the_walls_of_a_subgraph(ui: FrontEnd) -> None:
    ui.load(workflow("phased_wan22_t2v"))
    ui.close_dialogs()
    sampler = ui.node("PhasedDMDSampler")
    ui.do(
        """() => {
            const graph = window.app.graph, of = (type) => graph.nodes.find((node) => node.type === type);
            const plan = of("PhasedDMDPlanFromSteps"), number = LiteGraph.createNode("PrimitiveFloat");
            graph.add(number);
            number.widgets[0].value = 7;
            number.connect(0, plan, plan.inputs.findIndex((input) => input.name === "shift"));
            graph.convertToSubgraph(new Set([plan, of("PhasedDMDExperts")]));
        }"""
    )
    ui.wait("(id) => window.app.graph.getNodeById(id).phasedTimeline.textContent.includes('shift 7')", sampler)
    assert ui.timeline(sampler)["names"] == ["high_noise", "low_noise"]
    ui.wait(
        """() => [...window.app.graph.subgraphs.values()].flatMap((graph) => graph.nodes)
            .filter((node) => node.phasedTimeline?.textContent.includes("shift 7")).length === 2"""
    )
    sockets = """() => [...window.app.graph.subgraphs.values()].flatMap((graph) => graph.nodes)
        .flatMap((node) => node.inputs).filter((input) => /^model_/.test(input.name)).length"""
    assert ui.do(sockets) == 3
    assert ui.errors == []


def test_sockets_grow_and_the_hub_is_asked_for_when_chosen(ui: FrontEnd) -> None:
    ui.load(workflow("phased_wan22_t2v"))
    ui.close_dialogs()
    experts = ui.node("PhasedDMDExperts")
    sockets = """(id) => window.app.graph.getNodeById(id).inputs
        .filter((input) => input.type === 'MODEL').map((input) => input.name)"""
    assert ui.do(sockets, experts) == ["model_1", "model_2", "model_3"]
    ui.do(
        """(id) => {
            const node = window.app.graph.getNodeById(id), of = (name) => node.inputs.findIndex((i) => i.name === name);
            const link = window.app.graph.getLink(node.inputs[of("model_1")].link);
            window.app.graph.getNodeById(link.origin_id).connect(0, node, of("model_3"));
        }""",
        experts,
    )
    assert ui.do(sockets, experts)[-1] == "model_4"
    ui.do(
        """(id) => {
            const node = window.app.graph.getNodeById(id);
            for (const k of [3, 2]) node.disconnectInput(node.inputs.findIndex((i) => i.name === `model_${k}`));
        }""",
        experts,
    )
    assert ui.do(sockets, experts) == ["model_1", "model_2"]
    ui.load(workflow("phased_tiny_on_cpu"))
    ui.close_dialogs()
    load = ui.node("PhasedDMDLoadExperts")
    hidden = "(id) => window.app.graph.getNodeById(id).widgets.find((widget) => widget.name === 'hub_id').hidden"
    assert ui.do(hidden, load) is True
    ui.set_widget(load, "experts", "(Hub id)")
    assert ui.do(hidden, load) is False


def test_what_nodes_say_and_help_are_in_chinese_for_who_reads_that(browser: FrontEnd, server: Server) -> None:
    server.post("/settings/Comfy.Locale", "zh")
    try:
        with fresh_page(browser.page.context.browser, server.url) as ui:
            ui.load(workflow("phased_wan22_boundary"))
            ui.close_dialogs()
            plan = ui.node("PhasedDMDPlanFromBoundary")
            ui.cells(plan, 20)
            shown = ui.timeline(plan)
            assert shown["summary"] == "20 \u6b65, shift 8, \u6b65\u6570\u4efb\u610f" and shown["cut_off"] == []
            ui.fit()
            ui.screenshot("chinese")
            ui.load(workflow("phased_tiny_on_cpu"))
            ui.close_dialogs()
            note = ui.do("() => window.app.graph._nodes.find((node) => node.type === 'MarkdownNote').widgets[0].value")
            assert (
                note.startswith("## \u5f88\u5c0f\u7684\u6a21\u578b") and "teacher" in note and "The teacher" not in note
            )
            load, sampler, report = (ui.node(f"PhasedDMD{kind}") for kind in ("LoadExperts", "Sampler", "PlanReport"))
            ui.set_widget(sampler, "steps", 8)
            ui.cells(sampler, 8)
            assert (
                ui.timeline(sampler)["summary"]
                == "8 \u6b65\uff0c\u8bad\u7ec3\u65f6\u4e3a 4 \u6b65\uff1a\u8bf7\u628a\u6b65\u6570\u8bbe\u4e3a 0"
            )
            assert "\u7b2c 3 \u6b65  low_noise  sigma 0.8333" in ui.do(
                "(id) => window.app.graph.getNodeById(id).phasedText.innerText", report
            )
            ui.set_widget(load, "cfg", "a lot")
            ui.do("() => window.app.queuePrompt(0, 1)")
            error = "cfg \u662f 0 \u5230 100 \u7684\u6570"
            ui.wait(f"(id) => window.app.graph.getNodeById(id).phasedTimeline.textContent.startsWith('{error}')", load)
            deadline = time.monotonic() + SOON
            while not any(error in str(entry["status"]["messages"]) for entry in server.get("/history").values()):
                assert time.monotonic() < deadline  # what ComfyUI shows of a run that failed
                time.sleep(0.1)
            ui.close_dialogs()
            for kind in ("PhasedDMDSampler", "PhasedDMDPlanFromBoundary"):
                text = server.get(f"/extensions/phased-dmd/docs/{kind}/zh.md").decode()
                assert text.startswith("# \u5206\u9636\u6bb5") or text.startswith("# \u9636\u6bb5")
            assert ui.errors == []
    finally:
        server.post("/settings/Comfy.Locale", "en")


def test_bypassed_experts_fall_through_to_the_base(ui: FrontEnd) -> None:
    ui.load(workflow("phased_tiny_on_cpu"))
    ui.close_dialogs()
    load, sampler = ui.node("PhasedDMDLoadExperts"), ui.node("PhasedDMDSampler")
    base = ui.node("PhasedDMDLoadDiffusersFolder")
    ui.do("(id) => { window.app.graph.getNodeById(id).mode = 4; }", load)
    prompt = ui.do("async () => (await window.app.graphToPrompt()).output")
    assert prompt[str(sampler)]["inputs"]["model"] == [str(base), 0]


def test_the_motion_preset_is_found_by_the_name_that_its_users_know(ui: FrontEnd) -> None:
    ui.do("() => window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    ui.page.keyboard.type("TripleKSampler")
    ui.page.get_by_text("Phase Plan (preset)").first.wait_for()
    ui.close_dialogs()


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
        [saved],
    )
    assert ui.do("(id) => window.app.graph.getNodeById(id).imgs[0].naturalWidth", saved) == 256
    assert "step 4  low_noise" in ui.do("(id) => window.app.graph.getNodeById(id).phasedText.innerText", report)
    for node in (sampler, ui.node("PhasedDMDLoadExperts")):
        ui.cells(node, 4)
        assert ui.timeline(node)["cfgs"] == ["cfg 1"] * 2
    for steps, text in ((7, "7 steps, trained for 4: set steps to 0"), (0, "4 steps, shift 5, trained sigmas")):
        ui.set_widget(sampler, "steps", steps)
        ui.cells(sampler, steps or 4)
        ui.do("() => window.app.queuePrompt(0, 1)")
        server.finish()  # what ran is what was shown before
        ui.page.wait_for_timeout(500)
        assert ui.timeline(sampler)["summary"] == text
    runs = [run["outputs"][str(sampler)] for run in server.get("/history").values() if str(sampler) in run["outputs"]]
    ended = next(run for run in runs if len(run["phase_plan"][0]["steps"]) == 7)
    ui.do(  # the widget was set back while those 7 steps ran
        "([id, output]) => window.app.graph.getNodeById(id).onExecuted(output)", [sampler, ended]
    )
    ui.page.wait_for_timeout(500)
    assert ui.timeline(sampler)["summary"] == "4 steps, shift 5, trained sigmas"
    ui.fit()
    ui.screenshot("tiny_on_cpu")
    history = server.get("/history")
    assert any(prompt["prompt"][2][str(sampler)]["inputs"].get("seed") == 123 for prompt in history.values())
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

"""Graphs with two samplers for two experts become graphs with ours, which paint the same picture."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.comfyui.test_presets import templates
from tests.helpers.comfyui.browser import FrontEnd, front_end
from tests.helpers.comfyui.graphs import Graph
from tests.helpers.comfyui.server import Server

CONVERT = """async () => {
    const { convert } = await import("/extensions/phased-dmd/convert.js");
    return convert();
}"""


@pytest.fixture(scope="module")
def ui(server: Server):
    with front_end(server.url) as opened:
        yield opened


NOTES = """() => window.app.graph._nodes.flatMap((node) => (node.widgets ?? [])
    .filter((widget) => widget.name === "phased_note")
    .map((widget) => `${node.type}: ${widget.element.textContent}`))"""


def two_samplers(
    server: Server,
    steps: int,
    split: int,
    second: dict[str, Any] | None = None,
    first: dict[str, Any] | None = None,
    **both: Any,
) -> dict[str, Any]:
    """The teacher at two strengths of guidance, as Wan2.2's templates have its two networks; and changes of widgets."""
    graph = Graph(server.get("/object_info"))
    model, clip, vae = graph.add("PhasedDMDLoadDiffusersFolder", (0, 0), folder="teacher", tokens=16)
    (shifted,) = graph.add("ModelSamplingSD3", (0, 200), model=model, shift=5.0)
    (positive,) = graph.add("CLIPTextEncode", (380, 0), clip=clip, text="a panda on a blue background")
    (negative,) = graph.add("CLIPTextEncode", (380, 200), clip=clip, text="")
    size = {"width": 64, "height": 64, "length": 1, "batch_size": 1}
    (empty,) = graph.add("EmptyHunyuanLatentVideo", (380, 400), **size)
    common = {
        "positive": positive,
        "negative": negative,
        "steps": steps,
        "sampler_name": "euler",
        "scheduler": "simple",
        **both,
    }
    high = {"add_noise": "enable", "noise_seed": 17, "cfg": 3.0, "start_at_step": 0, "end_at_step": split}
    high |= {"return_with_leftover_noise": "enable", **(first or {})}
    low = {"add_noise": "disable", "noise_seed": 18, "cfg": 1.0, "start_at_step": split, "end_at_step": 10000}
    low |= second or {}
    (half,) = graph.add("KSamplerAdvanced", (800, 0), model=shifted, latent_image=empty, **{**common, **high})
    (whole,) = graph.add("KSamplerAdvanced", (1200, 0), model=shifted, latent_image=half, **{**common, **low})
    (images,) = graph.add("VAEDecode", (1600, 0), samples=whole, vae=vae)
    graph.add("SaveImage", (1600, 200), images=images, filename_prefix="convert")
    return graph.to_json()


def picture(ui: FrontEnd, server: Server) -> tuple[list[str], np.ndarray]:
    prompt = ui.do("async () => (await window.app.graphToPrompt()).output")
    outputs = server.run(prompt)
    (saved,) = (node for node, each in prompt.items() if each["class_type"] == "SaveImage")
    data = server.picture(outputs[saved]["images"][0])
    kinds = sorted(each["class_type"] for each in prompt.values())
    return kinds, np.asarray(Image.open(io.BytesIO(data))).astype(int)


@pytest.mark.parametrize(
    ("steps", "split", "plan", "changes"),
    [
        (4, 2, "Steps", {}),
        (20, 9, "Boundary", {}),
        (8, 4, "Sigmas", {"scheduler": "beta"}),
        (5, 2, "Sigmas", {"sampler_name": "uni_pc"}),
        (8, 4, "Steps", {"sampler_name": "dpmpp_2m"}),
        (4, 2, "Steps", {"sampler_name": "euler_ancestral"}),
        (4, 2, "Steps", {"second": {"sampler_name": "heun"}}),
    ],
    ids=lambda value: str(value),
)
def test_a_pair_of_ksampler_advanced_becomes_one_sampler(
    ui: FrontEnd, server: Server, steps: int, split: int, plan: str, changes: dict[str, Any]
) -> None:
    ui.load(two_samplers(server, steps, split, **changes))
    kinds, before = picture(ui, server)
    assert kinds.count("KSamplerAdvanced") == 2
    assert ui.do(CONVERT) == {"count": 1, "left": []}
    kinds, after = picture(ui, server)
    assert "KSamplerAdvanced" not in kinds and f"PhasedDMDPlanFrom{plan}" in kinds and "PhasedDMDSampler" in kinds
    assert before.std() > 5
    assert np.abs(before - after).max() <= 1
    assert ui.do(CONVERT) == {"count": 0, "left": []} and ui.do(NOTES) == []
    if not changes:
        ui.fit()
        ui.screenshot(f"converted_{steps}")


def test_other_noise_in_the_second_half_is_said(ui: FrontEnd, server: Server) -> None:
    ui.load(two_samplers(server, 4, 2, {"noise_seed": 0}, sampler_name="euler_ancestral"))
    assert ui.do(CONVERT) == {"count": 1, "left": []}
    assert ui.do(NOTES) == ["PhasedDMDSampler: euler_ancestral draws other noise in the second half"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"second": {"steps": 8}}, "the two samplers differ in steps"),
        ({"second": {"scheduler": "beta"}}, "the two samplers differ in scheduler"),
        ({"second": {"start_at_step": 3}}, "do not run from the first step to the last without a gap"),
        ({"scheduler": "ddim_uniform"}, "the sigmas of ddim_uniform do not descend from 1"),
        ({"second": {"sampler_name": "uni_pc"}}, "the two samplers have other sigmas"),
        ({"first": {"return_with_leftover_noise": "disable"}}, "set its return_with_leftover_noise to enable"),
    ],
)
def test_what_cannot_be_converted_is_left_and_said_on_the_node(
    ui: FrontEnd, server: Server, changes: dict[str, Any], message: str
) -> None:
    ui.load(two_samplers(server, 4, 2, **changes))
    done = ui.do(CONVERT)
    assert done["count"] == 0 and message in done["left"][0]
    kinds = ui.do("() => window.app.graph._nodes.map((node) => node.type)")
    assert kinds.count("KSamplerAdvanced") == 2
    (note,) = ui.do(NOTES)
    assert note.startswith("KSamplerAdvanced: Not converted: ") and message in note
    ui.do(CONVERT)
    assert len(ui.do(NOTES)) == 1
    if "first" in changes:
        ui.fit()
        ui.screenshot("not_converted")


def test_a_pair_whose_latent_is_also_used_elsewhere_is_left(ui: FrontEnd, server: Server) -> None:
    ui.load(two_samplers(server, 4, 2))
    ui.do(
        """() => {
            const graph = window.app.graph, upscale = LiteGraph.createNode("LatentUpscaleBy");
            graph.add(upscale);
            graph._nodes.find((node) => node.type === "KSamplerAdvanced").connect(0, upscale, 0);
        }"""
    )
    assert "also goes to another node" in ui.do(CONVERT)["left"][0]
    # a switch of the whole front end loads the graph again, some time later
    chinese = ui.do(
        """async () => {
            const { said } = await import("/extensions/phased-dmd/convert_words.js");
            return said({ extensionManager: { setting: { get: () => "zh-TW" } } }, "Not converted: {}", "steps");
        }"""
    )
    assert chinese == "\u672a\u8f6c\u6362\uff1asteps"


def test_a_pair_in_a_subgraph_is_converted_there(ui: FrontEnd, server: Server) -> None:
    ui.load(two_samplers(server, 4, 2))
    _, before = picture(ui, server)
    ui.do(
        """() => {
            const graph = window.app.graph;
            graph.convertToSubgraph(new Set(graph._nodes.filter((node) => node.type === "KSamplerAdvanced")));
        }"""
    )
    assert ui.do(CONVERT) == {"count": 1, "left": []}
    kinds, after = picture(ui, server)
    assert "KSamplerAdvanced" not in kinds and "PhasedDMDSampler" in kinds
    assert np.abs(before - after).max() <= 1


@pytest.mark.parametrize("name", ["video_wan2_2_14B_flf2v", "video_wan2_2_14B_fun_control"])
def test_templates_of_comfyui_are_converted(ui: FrontEnd, name: str) -> None:
    ui.load(json.loads((templates() / f"{name}.json").read_text(encoding="utf-8")), name)
    assert ui.do(CONVERT) == {"count": 1, "left": []}


def test_the_blueprint_takes_the_place_of_two_samplers(ui: FrontEnd, server: Server) -> None:
    """Found in the search for nodes, as users do, and wired by hand."""
    ui.load(two_samplers(server, 4, 2))
    _, before = picture(ui, server)
    ui.fit()
    ui.page.mouse.dblclick(900, 850)
    ui.page.locator("input:focus").wait_for()
    ui.page.keyboard.type("two experts")
    ui.page.get_by_text("two experts one sampler").first.wait_for()
    ui.page.wait_for_timeout(500)
    ui.screenshot("blueprint_search")
    ui.page.keyboard.press("Enter")
    ui.page.wait_for_timeout(500)
    ui.page.mouse.click(900, 850)
    ui.wait("() => window.app.graph._nodes.some((node) => node.title?.includes('two experts'))")
    ui.do(
        """() => {
            const graph = window.app.graph;
            const blueprint = graph._nodes.find((node) => node.title?.includes("two experts"));
            const [first, second] = graph._nodes.filter((node) => node.type === "KSamplerAdvanced");
            const socket = (node, name) => node.inputs.findIndex((input) => input.name === name);
            const move = (node, from, to) => {
                const link = graph.getLink(node.inputs[socket(node, from)].link);
                graph.getNodeById(link.origin_id).connect(link.origin_slot, blueprint, socket(blueprint, to));
            };
            move(first, "model", "model_high_noise");
            move(second, "model", "model_low_noise");
            for (const name of ["positive", "negative", "latent_image"]) move(first, name, name);
            const link = graph.getLink(second.outputs[0].links[0]);
            blueprint.connect(0, graph.getNodeById(link.target_id), link.target_slot);
            blueprint.pos = [first.pos[0] + 100, first.pos[1]];
            graph.remove(second);
            graph.remove(first);
            for (const [name, value] of [["cfg", "3, 1"], ["seed", 17]])
                blueprint.widgets.find((widget) => widget.name === name).value = value;
        }"""
    )
    ui.do("() => window.app.api.dispatchCustomEvent('graphChanged')")
    ui.wait(
        """() => window.app.graph._nodes.find((node) => node.subgraph).subgraph.nodes
            .find((node) => node.type === "PhasedDMDSampler").phasedTimeline.textContent.includes("cfg 3")"""
    )
    kinds, after = picture(ui, server)
    assert "KSamplerAdvanced" not in kinds and "PhasedDMDSampler" in kinds
    assert np.abs(before - after).max() <= 1 and before.std() > 5
    ui.do("() => window.app.canvas.deselectAll()")
    ui.page.mouse.move(800, 950)
    ui.fit()
    ui.screenshot("blueprint")


def test_a_wan_moe_ksampler_becomes_a_boundary(ui: FrontEnd, server: Server) -> None:
    """A node of the same sockets and widgets stands in, since that pack is not here."""
    graph = two_samplers(server, 4, 2)
    ui.do(
        """() => {
            if (LiteGraph.registered_node_types["WanMoeKSampler"]) return;
            class Moe extends LiteGraph.LGraphNode {
                constructor(title) {
                    super(title ?? "WanMoeKSampler");
                    this.comfyClass = "WanMoeKSampler";
                    for (const name of ["model_high_noise", "model_low_noise"]) this.addInput(name, "MODEL");
                    for (const name of ["positive", "negative"]) this.addInput(name, "CONDITIONING");
                    this.addInput("latent_image", "LATENT");
                    this.addOutput("LATENT", "LATENT");
                    const values = { boundary: 0.875, seed: 17, steps: 12, cfg_high_noise: 3, cfg_low_noise: 1,
                        sampler_name: "euler", scheduler: "simple", sigma_shift: 8, denoise: 1 };
                    for (const [name, value] of Object.entries(values))
                        this.addWidget(typeof value === "number" ? "number" : "text", name, value, () => {});
                }
            }
            LiteGraph.registerNodeType("WanMoeKSampler", Moe);
        }"""
    )
    ui.load(graph)
    ui.do(
        """() => {
            const graph = window.app.graph, moe = LiteGraph.createNode("WanMoeKSampler");
            graph.add(moe);
            const [first, second] = graph._nodes.filter((node) => node.type === "KSamplerAdvanced");
            const from = (node, name) => graph.getLink(node.inputs.find((input) => input.name === name).link);
            const move = (name, to) => {
                const link = from(first, name);
                graph.getNodeById(link.origin_id).connect(link.origin_slot, moe, to);
            };
            ["model", "model", "positive", "negative", "latent_image"].forEach((name, slot) => move(name, slot));
            for (const id of [...second.outputs[0].links]) {
                const link = graph.getLink(id);
                moe.connect(0, graph.getNodeById(link.target_id), link.target_slot);
            }
            graph.remove(second);
            graph.remove(first);
        }"""
    )
    assert ui.do(CONVERT) == {"count": 1, "left": []}
    prompt = ui.do("async () => (await window.app.graphToPrompt()).output")
    by_class = {each["class_type"]: each["inputs"] for each in prompt.values()}
    plan = by_class["PhasedDMDPlanFromBoundary"]
    assert (plan["boundary"], plan["steps"], plan["shift"]) == ("0.875", 12, "8")
    assert by_class["PhasedDMDExperts"]["cfg"] == "3, 1" and by_class["PhasedDMDSampler"]["seed"] == 17
    server.run(prompt)

"""The blueprints of ``subgraphs/``: subgraphs that ComfyUI offers among its nodes; ``write_assets`` writes them."""

from __future__ import annotations

import uuid
from typing import Any

from tests.helpers.comfyui.example_parts import experts_of, phased_sampler, plan_of_steps
from tests.helpers.comfyui.graphs import Graph, Output

_INSIDE, _OUTSIDE = -10, -20
"""What stands in a subgraph for its own inputs and outputs."""


def two_experts_one_sampler(info: dict[str, Any]) -> dict[str, Any]:
    """What takes the place of two KSamplerAdvanced: two MODELs, prompts and a latent in, a latent out."""
    graph = Graph(info)
    sockets = [("model_high_noise", "MODEL"), ("model_low_noise", "MODEL")]
    sockets += [("positive", "CONDITIONING"), ("negative", "CONDITIONING"), ("latent_image", "LATENT")]
    given = [Output(_INSIDE, slot, kind) for slot, (_, kind) in enumerate(sockets)]
    plan = plan_of_steps(graph, (0, 0), "2, 2", 5.0)
    model = experts_of(graph, (420, 0), plan, "1", *given[:2])
    texts = {"positive": given[2], "negative": given[3], "latent_image": given[4]}
    latent = phased_sampler(graph, (820, 0), model, **texts)
    widgets = [(plan, "steps"), (plan, "shift"), (model, "cfg")]
    widgets += [(latent, name) for name in ("seed", "sampler_name", "denoise")]
    return _blueprint("Phased DMD: two experts, one sampler", graph, sockets, widgets, [("LATENT", latent)])


def _blueprint(
    name: str,
    graph: Graph,
    sockets: list[tuple[str, str]],
    widgets: list[tuple[Output, str]],
    results: list[tuple[str, Output]],
) -> dict[str, Any]:
    """As the front end saves one. widgets: those of inner nodes that the subgraph has, too."""
    shown = []
    for owner, widget in widgets:
        kind = graph.link_widget(owner.node, widget, Output(_INSIDE, len(sockets), ""))
        sockets = [*sockets, (widget, kind)]
        shown.append(graph.prompt[str(owner.node)]["inputs"][widget])
    for slot, (_, result) in enumerate(results):
        number = len(graph.links) + 1
        graph.links.append([number, result.node, result.slot, _OUTSIDE, slot, result.kind])
        graph.nodes[result.node - 1]["outputs"][result.slot]["links"].append(number)
    words = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [dict(zip(words, link, strict=True)) for link in graph.links]
    inputs = [
        {"id": _identity(f"{name} in {label}"), "name": label, "type": kind, "linkIds": _from(links, _INSIDE, slot)}
        for slot, (label, kind) in enumerate(sockets)
    ]
    outputs = [
        {"id": _identity(f"{name} out {label}"), "name": label, "type": result.kind, "linkIds": _to(links, slot)}
        for slot, (label, result) in enumerate(results)
    ]
    right = max(node["pos"][0] + node["size"][0] for node in graph.nodes)
    subgraph = {
        "id": _identity(name),
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": len(graph.nodes), "lastLinkId": len(links), "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": name,
        "inputNode": {"id": _INSIDE, "bounding": [-220, 0, 140, 260]},
        "outputNode": {"id": _OUTSIDE, "bounding": [right + 80, 0, 120, 60]},
        "inputs": inputs,
        "outputs": outputs,
        "widgets": [],
        "nodes": graph.nodes,
        "groups": [],
        "links": links,
        "extra": {},
    }
    promoted = {widget for _, widget in widgets}
    outer = [
        {"name": label, "type": kind, "link": None} | ({"widget": {"name": label}} if label in promoted else {})
        for label, kind in sockets
    ]
    node = {
        "id": 1,
        "type": _identity(name),
        "pos": [0, 0],
        "size": [340, 320],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": outer,
        "outputs": [{"name": label, "type": result.kind, "links": []} for label, result in results],
        "title": name,
        "properties": {},
        "widgets_values": shown,
    }
    whole = {"revision": 0, "last_node_id": 1, "last_link_id": 0, "nodes": [node], "links": [], "version": 0.4}
    return {**whole, "definitions": {"subgraphs": [subgraph]}}


def _from(links: list[dict[str, Any]], node: int, slot: int) -> list[int]:
    return [link["id"] for link in links if (link["origin_id"], link["origin_slot"]) == (node, slot)]


def _to(links: list[dict[str, Any]], slot: int) -> list[int]:
    return [link["id"] for link in links if (link["target_id"], link["target_slot"]) == (_OUTSIDE, slot)]


def _identity(text: str) -> str:
    """The same in each writing."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"phased-dmd {text}"))


BLUEPRINTS = {"Phased DMD two experts one sampler": two_experts_one_sampler}
"""File name, by which the front end offers it, to what makes it."""

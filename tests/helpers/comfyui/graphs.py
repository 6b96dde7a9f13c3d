"""Workflows in the front end's format, built against what a running server says about its nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

ABOVE, AROUND = 80, 20
"""What a group has above its nodes, for its own title and theirs, and on the other sides."""
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


@dataclass(frozen=True)
class Output:
    """One output socket of a node in a graph."""

    node: int
    slot: int
    kind: str


@dataclass
class Graph:
    """``add`` nodes column by column, then ``to_json``. info: of GET /object_info."""

    info: dict[str, Any]
    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[list[Any]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    prompt: dict[str, Any] = field(default_factory=dict)
    """The same in the format that the server runs."""

    @contextlib.contextmanager
    def group(self, title: str) -> Iterator[None]:
        """A frame around the nodes that are added inside."""
        first = len(self.nodes)
        yield
        nodes = self.nodes[first:]
        left, top = (min(node["pos"][k] for node in nodes) for k in (0, 1))
        right, bottom = (max(node["pos"][k] + node["size"][k] for node in nodes) for k in (0, 1))
        bounding = [left - AROUND, top - ABOVE, right - left + 2 * AROUND, bottom - top + ABOVE + AROUND]
        group = {"id": len(self.groups) + 1, "title": title, "bounding": bounding, "color": "#3f789e"}
        self.groups.append(group | {"font_size": 24, "flags": {}})

    def add(
        self,
        kind: str,
        at: tuple[int, int],
        size: tuple[int, int] = (330, 120),
        title: str | None = None,
        models: list[dict[str, str]] | None = None,
        **inputs: Any,
    ) -> list[Output]:
        """A node; ``inputs`` are widget values and Outputs by name. Returns its outputs."""
        number, entry = len(self.nodes) + 1, self.info[kind]
        sockets, values = [], []
        run: dict[str, Any] = {}
        self.prompt[str(number)] = {"class_type": kind, "inputs": run}
        for name, spec in {**entry["input"].get("required", {}), **entry["input"].get("optional", {})}.items():
            accepts, options = spec[0], spec[1] if len(spec) > 1 else {}
            if isinstance(accepts, list) or options.get("widgetType", accepts) in WIDGETS:
                choices = accepts if isinstance(accepts, list) else options.get("options", [])
                values.append(inputs.pop(name, options.get("default", choices[0] if choices else "")))
                run[name] = values[-1]
                if options.get("control_after_generate"):
                    values.append("fixed")
                if options.get("image_upload"):
                    values.append("image")
                continue
            source = inputs.pop(name, None)
            if source is not None:
                run[name] = [str(source.node), source.slot]
            sockets.append({"name": name, "type": accepts, "link": self._link(source, number, len(sockets), accepts)})
        if inputs:
            raise ValueError(f"{kind} has no input {', '.join(inputs)}")
        outputs = [
            {"name": name, "type": type_, "links": [], "slot_index": slot}
            for slot, (name, type_) in enumerate(zip(entry["output_name"], entry["output"], strict=True))
        ]
        properties = {"Node name for S&R": kind} | ({"models": models} if models else {})
        node = {"id": number, "type": kind, "pos": list(at), "size": list(size), "flags": {}, "order": number - 1}
        node |= {"mode": 0, "inputs": sockets, "outputs": outputs, "properties": properties, "widgets_values": values}
        self.nodes.append(node | ({"title": title} if title else {}))
        return [Output(number, slot, each["type"]) for slot, each in enumerate(outputs)]

    def note(self, text: str, at: tuple[int, int], size: tuple[int, int] = (330, 260)) -> None:
        """Markdown beside the nodes."""
        node = {"id": len(self.nodes) + 1, "type": "MarkdownNote", "pos": list(at), "size": list(size), "flags": {}}
        node |= {"order": len(self.nodes), "mode": 0, "inputs": [], "outputs": [], "properties": {}}
        self.nodes.append(node | {"title": "About", "widgets_values": [text], "color": "#432", "bgcolor": "#653"})

    def link_widget(self, node: int, name: str, source: Output) -> str:
        """A widget that gets its value over a link; returns its type."""
        entry = self.nodes[node - 1]
        spec = self.info[entry["type"]]["input"]
        accepts, *_ = {**spec.get("required", {}), **spec.get("optional", {})}[name]
        kind = "COMBO" if isinstance(accepts, list) else accepts
        link = self._link(source, node, len(entry["inputs"]), kind)
        entry["inputs"].append({"name": name, "type": kind, "widget": {"name": name}, "link": link})
        return kind

    def _link(self, source: Output | None, node: int, slot: int, kind: str) -> int | None:
        if source is None:
            return None
        number = len(self.links) + 1
        self.links.append([number, source.node, source.slot, node, slot, kind])
        if source.node > 0:  # else an input of the subgraph that this graph becomes
            self.nodes[source.node - 1]["outputs"][source.slot]["links"].append(number)
        return number

    def to_json(self) -> dict[str, Any]:
        """As the front end saves it."""
        return {
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": self.groups,
            "config": {},
            "extra": {},
            "version": 0.4,
        }

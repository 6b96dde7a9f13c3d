"""Help and words are there for every node, in both languages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WEB = ROOT / "web/docs"


def test_every_node_has_help_in_chinese() -> None:
    nodes = {path.stem for path in WEB.glob("*.md")}
    assert nodes == {path.name for path in WEB.iterdir() if path.is_dir()}
    for node in nodes:
        text = (WEB / node / "zh.md").read_text(encoding="utf-8")
        assert len(text) > 60 and any("\u4e00" <= letter <= "\u9fff" for letter in text), node


def texts_of_templates() -> Iterator[str]:
    for path in [*(ROOT / "workflows").glob("*.json"), *(ROOT / "subgraphs").glob("*.json")]:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        for graph in [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]:
            for titled in [*graph["nodes"], *graph.get("groups", [])]:
                yield titled.get("title", "")
            for node in graph["nodes"]:
                if node["type"] == "MarkdownNote":
                    yield from node["widgets_values"][0].split("\n")


def test_notes_and_titles_of_templates_are_there_in_chinese() -> None:
    lines = json.loads((ROOT / "web/notes/zh.json").read_text(encoding="utf-8"))
    assert {text for text in texts_of_templates() if text} <= set(lines)
    assert all(any("\u4e00" <= letter <= "\u9fff" for letter in text) for text in lines.values())

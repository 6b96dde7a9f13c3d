"""Help and words are there for every node, in both languages."""

from __future__ import annotations

from pathlib import Path

WEB = Path(__file__).resolve().parents[2] / "web/docs"


def test_every_node_has_help_in_chinese() -> None:
    nodes = {path.stem for path in WEB.glob("*.md")}
    assert nodes == {path.name for path in WEB.iterdir() if path.is_dir()}
    for node in nodes:
        text = (WEB / node / "zh.md").read_text(encoding="utf-8")
        assert len(text) > 60 and any("\u4e00" <= letter <= "\u9fff" for letter in text), node

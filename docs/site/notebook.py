"""Notebooks as pages: their text, code, and the outputs that are stored in them."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Page:
    """A page and the pictures beside it.

    Attributes:
        text: Markdown.
        pictures: File name to PNG.
    """

    text: str = ""
    pictures: dict[str, bytes] = field(default_factory=dict)


def code_of(notebook: Path) -> str:
    """The code of a notebook, as a script."""
    return "\n\n".join(text(cell["source"]) for cell in cells_of(notebook) if cell["cell_type"] == "code")


def page_of(notebook: Path) -> Page:
    """The notebook as a page."""
    page, blocks = Page(), []
    for cell in cells_of(notebook):
        if cell["cell_type"] == "markdown":
            blocks.append(text(cell["source"]))
            continue
        blocks.append(f"```python\n{text(cell['source'])}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{notebook.stem}-{len(page.pictures)}.png"
                page.pictures[name] = base64.b64decode(text(data["image/png"]))
                blocks.append(f"![{notebook.stem}, figure {len(page.pictures)}]({name})")
            elif output["output_type"] == "stream" or "text/plain" in data:
                blocks.append(f"```text\n{text(output.get('text') or data['text/plain']).rstrip()}\n```")
    page.text = "\n\n".join(blocks) + "\n"
    return page


def cells_of(notebook: Path) -> list[dict[str, Any]]:
    """The cells, as in the file."""
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def text(lines: str | list[str]) -> str:
    """Text that a notebook may hold in one piece or line by line."""
    return lines if isinstance(lines, str) else "".join(lines)

"""Prompts on disk for tiny teachers."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.families.parts import picture


def write_prompts(folder: Path, images: bool = False, last: bool = False) -> Path:
    """Three, of different lengths; each with a picture where ``images`` says so, with two where ``last`` does."""
    if not images:
        path = folder / "prompts.txt"
        path.write_text("a panda\na fox on red ice\nan apple\n", encoding="utf-8")
        return path
    lines = []
    for i, prompt in enumerate(("a panda", "a fox on red ice", "an apple")):
        picture(i, (64, 48)).save(folder / f"{i}.png")
        found = {"prompt": prompt, "image": f"{i}.png"}
        if last:
            picture(i + 3, (64, 48)).save(folder / f"last_{i}.png")
            found["last_image"] = f"last_{i}.png"
        lines.append(json.dumps(found))
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path

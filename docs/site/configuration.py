"""The page of configuration keys: ``python -m docs.site.configuration`` writes ``docs/configuration.md``."""

from __future__ import annotations

from pathlib import Path

from training.config.keys import fields_of
from training.config.schema import DistillConfig

ROOT = Path(__file__).resolve().parents[2]

HEAD = """# Configuration keys

Every key of `training/distill.py`, by section. A run is a YAML file with these keys; `training/configs` has examples,
and `key.inner=value` at the end of the command replaces a value. `python training/distill.py --help` prints the same
list. Written by `python -m docs.site.configuration`.
"""


def page() -> str:
    """The page as Markdown."""
    sections: dict[str, list[str]] = {}
    for name, default, description in fields_of(DistillConfig):
        section = name.partition(".")[0] if "." in name else "top level"
        value, _, choices = default.partition(" of ")
        allowed = f" (one of {choices.replace('|', ', ')})" if choices else ""
        what = description.replace("|", "\\|")
        sections.setdefault(section, []).append(f"| `{name}` | {value}{allowed} | {what} |")
    parts = [HEAD]
    for section in sorted(sections, key=lambda name: (name != "top level",)):
        title = "The run" if section == "top level" else f"`{section}`"
        parts.append(
            "\n".join([f"## {title}\n", "| key | default | what |", "| --- | --- | --- |", *sections[section]])
        )
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "configuration.md").write_text(page(), encoding="utf-8")

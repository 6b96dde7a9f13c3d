"""What MkDocs builds beside the Markdown files of ``docs``: API reference, help of the ComfyUI nodes, examples."""

from __future__ import annotations

from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from notebook import page_of
from reference import ROOT, page, public_modules

NODE_HELP = ROOT / "web" / "docs"
EXAMPLES = ROOT / "docs" / "examples"


def section(nav: list[Any], title: str) -> list[Any]:
    """The list of the section with this title, at any depth."""
    for item in nav:
        if isinstance(item, dict):
            ((name, content),) = item.items()
            if name == title:
                return content
            if isinstance(content, list) and (found := section(content, title)) is not None:
                return found
    return None


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the sections of the navigation that are made of sources."""
    modules = public_modules()
    tree: dict[str, list[Any]] = {"pdmd_core": section(config.nav, "API reference")}
    for module in modules:
        if module.is_package and module.name != "pdmd_core":
            tree[module.name] = []
            tree[module.name.rpartition(".")[0]].append({module.name.rpartition(".")[2]: tree[module.name]})
        parent = module.name if module.is_package else module.name.rpartition(".")[0]
        tree[parent].append(module.page if module.is_package else {module.name.rpartition(".")[2]: module.page})
    section(config.nav, "Examples").extend(
        f"examples/{path.stem}.md" for path in sorted(EXAMPLES.iterdir()) if path.suffix in {".py", ".ipynb"}
    )
    section(config.nav, "Nodes").extend(f"nodes/{path.name}" for path in sorted(NODE_HELP.glob("*.md")))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in ``docs``."""
    modules = {module.name: module for module in public_modules()}
    for module in modules.values():
        files.append(File.generated(config, module.page, content=page(module, modules)))
    for path in NODE_HELP.glob("*.md"):
        files.append(File.generated(config, f"nodes/{path.name}", abs_src_path=str(path)))
    for path in EXAMPLES.glob("*.ipynb"):
        notebook = page_of(path)
        files.append(File.generated(config, f"examples/{path.stem}.md", content=notebook.text))
        for name, content in notebook.pictures.items():
            files.append(File.generated(config, f"examples/{name}", content=content))
    for path in EXAMPLES.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        text = f"# {path.name}\n\n```python\n{source}```\n"
        files.append(File.generated(config, f"examples/{path.stem}.md", content=text))
    return files

"""What the Comfy registry and its users get."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pathspec
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def archive() -> set[str]:
    """Tracked files without those that .comfyignore names."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    ignored = pathspec.GitIgnoreSpec.from_lines((ROOT / ".comfyignore").read_text().splitlines())
    return {path for path in listed if path and not ignored.match_file(path)}


def test_the_archive_has_all_that_nodes_need_and_no_training(archive: set[str]) -> None:
    needed = {path.relative_to(ROOT).as_posix() for path in (ROOT / "comfy_nodes").glob("*.py")}
    for folder in ("web", "web/docs", "locales/en", "locales/zh", "workflows", "subgraphs", "pdmd_core/experts"):
        needed |= {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).iterdir() if path.is_file()}
    needed |= {"__init__.py", "pyproject.toml", "LICENSE", "pdmd_core/phases.py"}
    models = {path for path in archive if path.startswith("training/embedded/models/")}
    assert needed <= archive and {path.split("/")[3] for path in models} >= {"teacher", "experts"}
    others = archive - models
    assert not [path for path in others if path.startswith(("training/", "tests/", "benchmarks/", "docs/", ".github/"))]
    assert sum((ROOT / path).stat().st_size for path in archive) < 25e6


def test_nothing_is_run_or_installed_on_users_machines(archive: set[str]) -> None:
    assert {"requirements.txt", "install.py", "setup.py"}.isdisjoint(archive)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dependencies"] == []
    assert {"PublisherId", "DisplayName", "requires-comfyui"} <= set(project["tool"]["comfy"])


def test_the_icon_is_a_shipped_file_of_the_repository(archive: set[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    address = project["project"]["urls"]["Repository"].replace("github.com", "raw.githubusercontent.com") + "/main/"
    icon = project["tool"]["comfy"]["Icon"]
    assert icon.startswith(address) and icon.removeprefix(address) in archive
    root = ElementTree.fromstring((ROOT / icon.removeprefix(address)).read_text())
    assert (
        root.tag.endswith("svg") and int(root.get("width", 0)) == int(root.get("height", 0)) == 400
    )  # at most 800x400


def test_the_root_can_be_imported_anywhere() -> None:
    """Two names and no import: ComfyUI calls the entry point, everyone else pays nothing."""
    import ast

    tree = ast.parse((ROOT / "__init__.py").read_text())
    assert not [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.name for node in tree.body if isinstance(node, ast.AsyncFunctionDef)}
    assert names == {"comfy_entrypoint"}
    assert "NODE_CLASS_MAPPINGS" not in (ROOT / "__init__.py").read_text()


def test_templates_lie_in_the_only_folder_that_comfyui_serves_as_such() -> None:
    """ComfyUI answers a request for a template from the first of these folders that it finds, and looks no further."""
    served = ("example_workflows", "example", "examples", "workflow", "workflows")
    assert [name for name in served if (ROOT / name).exists()] == ["workflows"]

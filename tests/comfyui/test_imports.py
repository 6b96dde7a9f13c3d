"""What the registry ships, and what that needs besides ComfyUI: nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.comfyui import install
from tests.comfyui.conftest import VERSION
from tests.helpers.comfyui.browser import front_end
from tests.helpers.comfyui.server import REPOSITORY, running

ABSENT = ("diffusers", "peft", "accelerate", "matplotlib")
LOAD = """
import asyncio, sys

from importlib.machinery import PathFinder
find = PathFinder.find_spec

def find_others(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {absent!r} else find(name, path, target)

PathFinder.find_spec = classmethod(find_others)
sys.path.insert(0, {tree!r})
sys.argv = ["main.py", "--cpu", "--base-directory", {base!r}]
import comfy.options
comfy.options.enable_args_parsing()
import nodes
asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
before = set(sys.modules)
assert asyncio.run(nodes.load_custom_node({pack!r}))
print(sorted(name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("PhasedDMD")))
print(sorted(name for name in {{name.partition(".")[0] for name in set(sys.modules) - before}} if {pack!r} not in name))
try:
    import diffusers
except ImportError as error:
    print(error)
"""


def comfy(*words: str, folder: Path) -> str:
    """The registry's own command line tool, in this folder."""
    command = [str(install.cache() / "comfy-cli/bin/comfy"), "--skip-prompt", "--no-enable-telemetry", *words]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "HOME": str(folder.parent)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with the archive that the registry would get, of the last commit, as its only node pack."""
    base = tmp_path_factory.mktemp("packed")
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(base / "clone")], check=True)
    assert "All validation checks passed" in comfy("node", "validate", folder=base / "clone")
    comfy("node", "pack", folder=base / "clone")
    with zipfile.ZipFile(base / "clone/node.zip") as archive:
        archive.extractall(base / "custom_nodes/phased-dmd")
    return base


def test_the_archive_holds_help_words_templates_and_tiny_models_and_no_training(packed: Path) -> None:
    pack = packed / "custom_nodes/phased-dmd"
    for folder in ("web/docs", "locales/en", "locales/zh", "workflows", "comfy_nodes", "web"):
        names = {path.name for path in (REPOSITORY / folder).iterdir() if path.is_file()}
        assert names == {path.name for path in (pack / folder).iterdir() if path.is_file()}, folder
    assert {path.name for path in pack.iterdir()}.isdisjoint({"tests", "docs", "benchmarks"})
    assert [path.relative_to(pack).as_posix() for path in pack.glob("training/*/*")] == ["training/embedded/models"]
    assert sum(path.stat().st_size for path in pack.rglob("*") if path.is_file()) < 25e6


@pytest.mark.skipif(VERSION != install.NEWEST, reason="old versions cannot load the tiny teacher")
def test_the_tiny_template_of_the_archive_runs_in_an_empty_comfyui(packed: Path) -> None:
    """As its template browser fetches it, without a clone and without a download."""
    for name in ("diffusion_models", "loras", "diffusers", "vae", "text_encoders"):
        (packed / "models" / name).mkdir(parents=True, exist_ok=True)
    for name in ("input", "output"):
        (packed / name).mkdir(exist_ok=True)
    with running(install.tree(VERSION), packed) as server, front_end(server.url) as ui:
        assert "phased_tiny_on_cpu" in server.get("/workflow_templates")["phased-dmd"]
        ui.do(
            """async () => {
                const answer = await fetch("/api/workflow_templates/phased-dmd/phased_tiny_on_cpu.json");
                await window.app.loadGraphData(await answer.json(), true, true, "phased_tiny_on_cpu");
            }"""
        )
        ui.close_dialogs()
        saved = ui.node("SaveImage")
        ui.do("() => window.app.queuePrompt(0, 1)")
        ui.wait("(id) => window.app.graph.getNodeById(id).imgs?.[0]?.naturalWidth === 256", saved)
        ui.screenshot("archive")
        assert ui.errors == []


def test_the_archive_loads_with_diffusers_peft_and_accelerate_absent(packed: Path) -> None:
    pack = str(packed / "custom_nodes/phased-dmd")
    code = LOAD.format(absent=ABSENT, tree=str(install.tree(VERSION)), base=str(packed), pack=pack)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, cwd=packed)
    assert done.returncode == 0, done.stderr
    nodes, brought, error = done.stdout.splitlines()[-3:]
    assert nodes.count("PhasedDMD") >= 9
    assert "transformers" not in brought and "huggingface_hub" not in brought, brought
    assert error == "No module named 'diffusers'"


def test_no_node_name_hides_one_of_comfyuis(pack) -> None:
    import nodes

    ours = {name for name, kind in nodes.NODE_CLASS_MAPPINGS.items() if kind.__module__.startswith(pack.name)}
    assert ours and all(name.startswith("PhasedDMD") for name in ours)

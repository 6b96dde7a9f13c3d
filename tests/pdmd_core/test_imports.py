"""What the library needs when it is imported: ComfyUI users install nothing, and load it under another name."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pdmd_core

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pdmd_core"
NEEDS_DIFFUSERS = ("pdmd_core.scheduler", "pdmd_core.pipelines")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in PACKAGE.rglob("*.py")
}
LIGHT = sorted(name for name in MODULES if not name.startswith(NEEDS_DIFFUSERS))
"""Modules that need torch and safetensors at most."""
BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name.partition(".")[0])

sys.meta_path.insert(0, Blocked())
"""


def python(code: str, path: Path, *options: str) -> str:
    """Run code in a fresh interpreter that finds packages in ``path``; returns what it prints."""
    code = f"import sys; sys.path.insert(0, {str(path)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-I", *options, "-c", code], capture_output=True, text=True, timeout=120, cwd=path
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_phase_plan_needs_nothing_but_the_standard_library() -> None:
    code = "import pdmd_core, pdmd_core.phases as p; print(p.PhasePlan.from_steps([2, 2], shift=5.0).boundaries)"
    assert python(code, ROOT, "-S") == "(0.8333333333333334,)"


def test_the_library_imports_with_diffusers_transformers_peft_and_the_hub_blocked() -> None:
    blocked = {"diffusers", "transformers", "peft", "accelerate", "huggingface_hub", "tokenizers", "pydantic", "yaml"}
    assert {
        f"pdmd_core.{name}" for name in ("distillation", "roles", "experts.format.manifest", "families.wan")
    } <= set(LIGHT)
    imports = "\n".join(f"import {name}" for name in LIGHT)
    works = """
from pdmd_core.families import family
print(family("wan").native_module_name("blocks.3.attn1.to_q"))
try:
    import diffusers
except ImportError as error:
    print(error)
"""
    output = python(f"BLOCKED = {blocked!r}{BLOCK}{imports}{works}", ROOT)
    assert output.splitlines() == ["blocks.3.self_attn.q", "diffusers is blocked"]


@pytest.mark.parametrize("name", ["other_name", "pack.pdmd_core"])
def test_the_library_works_under_another_package_name(tmp_path: Path, name: str) -> None:
    target = tmp_path / name.replace(".", "/")
    target.parent.mkdir(exist_ok=True)
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__"))
    modules = "phases, flow, objectives, rollout, distillation, roles, metrics, families, experts"
    code = f"""
VERSION = {pdmd_core.__version__!r}
BLOCKED = {{"pdmd_core", "diffusers", "peft", "transformers", "huggingface_hub"}}
{BLOCK}
import torch
from {name} import __version__, {modules}
from {name}.experts import PhasedExperts, lora_to_file, write_experts
from {name}.experts.format import manifest
from {name}.experts.hub import card
from {name}.families import family

plan = phases.PhasePlan.from_steps([1], shift=5.0)
wan = family("wan")
state = {{"blocks.0.ffn.net.2.lora_A": torch.ones(2, 3), "blocks.0.ffn.net.2.lora_B": torch.ones(3, 2)}}
expert = manifest.Expert("all_noise", "x.safetensors", "lora", "", rank=2, alpha=1.0, targets=("ffn.net.2",))
written = manifest.Manifest(manifest.BaseModel("b", wan.architecture, "wan"), plan, (expert,))
import pathlib
folder = pathlib.Path({str(tmp_path / "experts")!r})
write_experts(folder, written, {{"all_noise": lora_to_file(state, 1.0, wan)}})
print(sorted(PhasedExperts.open(folder).lora_state("all_noise")))
print(PhasedExperts.__module__, __version__ == VERSION)
"""
    assert python(code, tmp_path).splitlines() == [
        "['blocks.0.ffn.net.2.lora_A', 'blocks.0.ffn.net.2.lora_B']",
        f"{name}.experts.folder True",
    ]


def test_the_names_at_the_top_are_those_of_their_modules() -> None:
    assert set(pdmd_core.__all__) <= set(dir(pdmd_core))
    for name in pdmd_core.__all__:
        assert getattr(pdmd_core, name) is not None
    assert pdmd_core.PhasePlan is pdmd_core.phases.PhasePlan
    assert pdmd_core.attach_experts is pdmd_core.pipelines.attach_experts
    with pytest.raises(AttributeError, match="no attribute 'load_pipeline'"):
        _ = pdmd_core.load_pipeline


def test_a_name_that_needs_diffusers_says_what_to_install_when_it_is_missing() -> None:
    code = """
import pdmd_core
for name in ("PhasedDMDScheduler", "load_phased_pipeline"):
    try:
        getattr(pdmd_core, name)
    except ImportError as error:
        print(error)
"""
    lines = python(f"BLOCKED = {{'diffusers'}}{BLOCK}{code}", ROOT).splitlines()
    assert [line.partition(" needs ")[0] for line in lines] == ["PhasedDMDScheduler", "load_phased_pipeline"]
    assert all(line.endswith('diffusers: pip install "phased-dmd[diffusers]"') for line in lines)


@pytest.mark.parametrize("command", ["inspect experts", "verify experts", "convert experts --to full --output out"])
def test_the_command_without_torch_says_in_one_line_what_to_install(command: str) -> None:
    code = f"""
import contextlib, io
from pdmd_core.experts.__main__ import main
with contextlib.redirect_stderr(io.StringIO()) as said:
    status = main({command.split()!r})
print(status, said.getvalue().strip())
"""
    expected = '2 phased-dmd: torch is needed for this: pip install "phased-dmd[diffusers]"'
    assert python(f"BLOCKED = {{'torch'}}{BLOCK}{code}", ROOT) == expected


def test_the_command_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    from pdmd_core.experts.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"phased-dmd {pdmd_core.__version__}\n"


def test_the_package_is_typed_and_its_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert (PACKAGE / "py.typed").exists() and "py.typed" in project["tool"]["setuptools"]["package-data"]["pdmd_core"]
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "pdmd_core.__version__"}
    assert project["tool"]["comfy"]["version"]["path"] == "pdmd_core/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", pdmd_core.__version__)


def test_every_import_within_the_library_is_relative_and_none_points_at_the_application() -> None:
    ours = {"pdmd_core", "training", "comfy_nodes", "tests"}
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 10
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                depth = len(path.relative_to(PACKAGE).parts)
                assert node.level <= depth, f"{path}:{node.lineno} leaves the package"
                names = [node.module or ""] if node.level == 0 else []
            assert not ours & {name.partition(".")[0] for name in names}, f"{path}:{node.lineno}"

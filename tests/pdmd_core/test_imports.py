"""What the library needs when it is imported: ComfyUI users install nothing, and load it under another name."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
            raise ImportError(f"{name} is blocked")

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
    assert {f"pdmd_core.{name}" for name in ("distillation", "roles", "experts.manifest", "families.wan")} <= set(LIGHT)
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
BLOCKED = {{"pdmd_core", "diffusers", "peft", "transformers", "huggingface_hub"}}
{BLOCK}
import torch
from {name} import {modules}
from {name}.experts import card, files, hub, lora_keys, manifest
from {name}.families import family

plan = phases.PhasePlan.from_steps([1], shift=5.0)
wan = family("wan")
state = {{"blocks.0.ffn.net.2.lora_A": torch.ones(2, 3), "blocks.0.ffn.net.2.lora_B": torch.ones(3, 2)}}
expert = manifest.Expert("all_noise", "x.safetensors", "lora", "", rank=2, alpha=1.0, targets=("ffn.net.2",))
written = manifest.Manifest(manifest.BaseModel("b", wan.architecture, "wan"), plan, (expert,))
import pathlib
folder = pathlib.Path({str(tmp_path / "experts")!r})
files.write_experts(folder, written, {{"all_noise": lora_keys.lora_to_file(state, 1.0, wan)}})
print(sorted(files.PhasedExperts.open(folder).lora_state("all_noise")))
print(files.PhasedExperts.__module__)
"""
    assert python(code, tmp_path).splitlines() == [
        "['blocks.0.ffn.net.2.lora_A', 'blocks.0.ffn.net.2.lora_B']",
        f"{name}.experts.files",
    ]


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

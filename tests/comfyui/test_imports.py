"""What the pack needs besides ComfyUI: nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.comfyui import install
from tests.comfyui.conftest import VERSION

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


def test_the_pack_loads_with_diffusers_peft_and_accelerate_absent(base: Path) -> None:
    pack = str(base / "custom_nodes/phased-dmd")
    code = LOAD.format(absent=ABSENT, tree=str(install.tree(VERSION)), base=str(base), pack=pack)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=base)
    assert done.returncode == 0, done.stderr
    nodes, brought, error = done.stdout.splitlines()[-3:]
    assert nodes.count("PhasedDMD") >= 9
    assert "transformers" not in brought and "huggingface_hub" not in brought, brought
    assert error == "No module named 'diffusers'"


def test_no_node_name_hides_one_of_comfyuis(pack) -> None:
    import nodes

    ours = {name for name, kind in nodes.NODE_CLASS_MAPPINGS.items() if kind.__module__.startswith(pack.name)}
    assert ours and all(name.startswith("PhasedDMD") for name in ours)

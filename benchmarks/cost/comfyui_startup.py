"""What the node pack adds to ComfyUI's start: seconds and modules, in fresh processes of the test environment.

    python benchmarks/cost/comfyui_startup.py [--runs 5]

Needs the environment of ``make test-comfyui``. Prints JSON: the median over the runs of ComfyUI's own import and of
loading the pack after it, and the top-level packages that only the pack brings in.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pdmd_core.arguments import COUNT
from tests.comfyui import install

ROOT = Path(__file__).resolve().parents[2]

MEASURE = """
import asyncio, json, sys, time
sys.path.insert(0, {tree!r})
sys.argv = ["main.py", "--cpu", "--base-directory", {base!r}]
start = time.perf_counter()
import comfy.options
comfy.options.enable_args_parsing()
import nodes
import server
loop = asyncio.new_event_loop()
server.PromptServer(loop)
loop.run_until_complete(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
core = time.perf_counter()
before = set(sys.modules)
assert loop.run_until_complete(nodes.load_custom_node({pack!r}))
pack = time.perf_counter()
brought = sorted({{name.partition(".")[0] for name in set(sys.modules) - before if not name.startswith({pack!r})}})
print(json.dumps({{"comfyui": core - start, "pack": pack - core, "packages": brought}}))
"""


def measure(tree: Path, base: Path) -> dict[str, object]:
    """One start in a process of its own."""
    code = MEASURE.format(tree=str(tree), base=str(base), pack=str(base / "custom_nodes/phased-dmd"))
    done = subprocess.run([str(install.python()), "-c", code], capture_output=True, text=True, check=True, cwd=base)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=COUNT, default=5)
    parser.add_argument("--version", default=install.NEWEST, choices=install.VERSIONS)
    arguments = parser.parse_args()
    if not install.python().exists():
        raise SystemExit("no ComfyUI here: run `make test-comfyui` once, or tests/comfyui/install.py")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "custom_nodes").mkdir()
        (base / "custom_nodes/phased-dmd").symlink_to(ROOT)
        runs = [measure(install.tree(arguments.version), base) for _ in range(arguments.runs)]
    result = {
        "comfyui_version": arguments.version,
        "runs": arguments.runs,
        "comfyui_seconds": round(statistics.median(float(str(run["comfyui"])) for run in runs), 3),
        "pack_seconds": round(statistics.median(float(str(run["pack"])) for run in runs), 3),
        "packages_only_the_pack_brings": runs[0]["packages"],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""What another text in a widget of Load Phased Experts costs: seconds, and memory above what the server held.

    .comfyui/venv/bin/python benchmarks/cost/comfyui_widget_change.py [--pack PATH]

Needs the environment of ``make test-comfyui`` and Linux. Two full experts of 200 MB in the real server; the cfg is
changed and the prompt queued again. ``--pack`` takes another checkout of this repository. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil

from pdmd_core.experts import BaseModel, Expert, Manifest, write_experts
from pdmd_core.phases import PhasePlan
from tests.comfyui import install
from tests.helpers.comfyui.server import make_base, running
from tests.helpers.comfyui.tiny_models import wan_file
from tests.helpers.tiny import transformer

ROOT = Path(__file__).resolve().parents[2]

SIZES = {"num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 2048, "num_layers": 12}
CHANGES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, default=ROOT)
    pack = parser.parse_args().pack.resolve()
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base")
        link = base / "custom_nodes/phased-dmd"
        link.unlink()
        link.symlink_to(pack)
        plan = PhasePlan.from_steps([2, 2], shift=5.0)
        names = [phase.name for phase in plan.phases]
        entries = tuple(Expert(name, f"{name}.safetensors", "full", "") for name in names)
        origin = BaseModel("random/wan", "WanTransformer3DModel", "wan")
        states = {name: dict(transformer(k, **SIZES).state_dict()) for k, name in enumerate(names)}
        write_experts(base / "models/phased_experts/large", Manifest(origin, plan, entries, 1.0), states)
        wan_file(base / "models/diffusion_models/base.safetensors", 9, **SIZES)
        size = (base / "models/phased_experts/large/high_noise.safetensors").stat().st_size
        with running(install.tree(install.NEWEST), base) as server:
            found = [
                psutil.Process(each.pid)
                for each in psutil.Process().children()
                if "main.py" in " ".join(each.cmdline())
            ]
            (process,) = found
            rows = [change(server, process, cfg) for cfg in ("1", *(str(n + 2) for n in range(CHANGES)))]
    print(json.dumps({"megabytes of an expert": round(size / 1e6), "first": rows[0], "changes": rows[1:]}))


def change(server: object, process: psutil.Process, cfg: str) -> dict[str, float]:
    """Queue the prompt with this cfg: seconds, and the peak of memory above that before it."""
    inputs = {"experts": "large", "hub_id": "", "strength": 1.0, "cfg": cfg, "set_shift": True, "base_1": ["1", 0]}
    prompt = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "base.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "PhasedDMDLoadExperts", "inputs": inputs},
        "3": {"class_type": "PhasedDMDPlanReport", "inputs": {"model": ["2", 0]}},
    }
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    before, start = process.memory_info().rss, time.perf_counter()
    server.run(prompt)  # type: ignore[attr-defined]
    seconds = time.perf_counter() - start
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
    return {"seconds": round(seconds, 2), "megabytes above": round((peak - before) / 1e6)}


if __name__ == "__main__":
    main()

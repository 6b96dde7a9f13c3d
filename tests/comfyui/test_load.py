"""A server under load: other experts with every prompt, interrupts, memory that runs out at the switch.

Afterwards its memory is what it was, and its pictures are those of a fresh server, byte for byte. The long form
(``make test-comfyui-load``) queues 500 prompts.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from pdmd_core.phases import PhasePlan
from tests.comfyui import install
from tests.comfyui.conftest import VERSION
from tests.comfyui.test_server import workflow
from tests.helpers.comfyui.server import Server, make_base, running
from tests.helpers.comfyui.tiny_models import teacher_experts

KINDS = ["experts", "other experts", "loras", "models", "undistilled", "plain"]
SLACK = 0.10
"""Of the resident memory at the baseline: the allocator's."""


def prompt(kind: str, seed: int, out_of_memory: bool = False) -> dict[str, Any]:
    """Six ways to sample, which share the teacher and differ in experts, plan, sampler and cfg."""
    graph = workflow(seed, "load")
    del graph["9"]
    if kind == "other experts":
        graph["2"]["inputs"] |= {"experts": "other", "set_shift": False}
        graph["6"]["inputs"] |= {"sampler_name": "dpmpp_2m", "steps": 8}
    elif kind == "plain":
        graph["6"] = workflow(seed, sampler="KSampler")["6"]
        graph["6"]["inputs"] |= {"model": ["1", 0], "cfg": 1.5, "sampler_name": "euler_ancestral"}
    elif kind != "experts":
        steps = "1, 1, 2" if kind == "undistilled" else "2, 2"
        plan = {"steps": steps, "shift": 5.0, "names": ""}
        graph["10"] = {"class_type": "PhasedDMDPlanFromSteps", "inputs": plan}
        common = {"plan": ["10", 0], "cfg": "2, 1, 1" if kind == "undistilled" else "1", "set_shift": True}
        high, low = "high_noise.safetensors", "low_noise.safetensors"
        if kind == "models":
            lora = {"model": ["1", 0], "lora_name": low, "strength_model": 1.0}
            graph["11"] = {"class_type": "LoraLoaderModelOnly", "inputs": lora}
            models = {"model_1": ["1", 0], "model_2": ["11", 0]}
            graph["2"] = {"class_type": "PhasedDMDExperts", "inputs": {**common, **models}}
        else:
            files = ["none", high, low, "none"] if kind == "undistilled" else [high, low, "none", "none"]
            loras = {f"lora_{k}": file for k, file in enumerate(files, 1)}
            strengths = {f"strength_{k}": 1.0 for k in range(1, 5)}
            inputs = {"model": ["1", 0], **common, **loras, **strengths}
            graph["2"] = {"class_type": "PhasedDMDExpertsLoRA", "inputs": inputs}
    if out_of_memory:
        graph["12"] = {"class_type": "OutOfMemoryAtTheSwitch", "inputs": {"model": ["2", 0]}}
        graph["6"]["inputs"]["model"] = ["12", 0]
    return graph


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = make_base(tmp_path / "base")
    faults = folder / "custom_nodes/faults"
    faults.mkdir()
    nodes = Path(__file__).parents[1] / "helpers" / "comfyui" / "fault_nodes.py"
    (faults / "__init__.py").write_text(nodes.read_text())
    other = teacher_experts(folder / "models/phased_experts/other", PhasePlan.from_steps([2, 2], shift=5.0))
    for name in ("high_noise", "low_noise"):
        (folder / f"models/loras/{name}.safetensors").symlink_to(other / f"{name}.safetensors")
    return folder


def pictures(server: Server, kinds: list[str]) -> dict[str, bytes]:
    outputs = {kind: server.run(prompt(kind, 7)) for kind in kinds}
    return {kind: server.picture(outputs[kind]["8"]["images"][0]) for kind in kinds}


def memory(server: Server) -> tuple[dict[str, int], int]:
    """What lives in the server when it holds no models, and the bytes of its process."""
    server.post("/free", {"unload_models": True, "free_memory": True})
    last: Any = None
    for _ in range(120):  # the server frees when its queue wakes up
        time.sleep(0.5)
        now = server.get("/faults/alive")
        if now == last:
            break
        last = now
    children = psutil.Process().children()
    process = next(each for each in children if str(server.base) in each.cmdline())
    return last, process.memory_info().rss


@pytest.mark.parametrize("prompts", [36, pytest.param(500, marks=pytest.mark.long)])
def test_load_leaves_memory_at_the_baseline_and_pictures_as_of_a_fresh_server(
    base: Path, prompts: int, record_property: Any
) -> None:
    chance, ended, tree = random.Random(0), Counter[str](), install.tree(VERSION)
    with running(tree, base) as server:
        for kind in KINDS:  # what is made once stays: imports, tables, caches of the allocator
            server.run(prompt(kind, 1))
        alive, resident = memory(server)
        todo = []
        for n in range(prompts):
            kind = KINDS[n % len(KINDS)] if n < len(KINDS) else chance.choice(KINDS)
            fault = chance.choices(["none", "interrupt", "memory"], [0.5, 0.3, 0.2])[0]
            fault = "none" if kind == "plain" and fault == "memory" else fault
            todo.append((fault, chance.random(), server.queue(prompt(kind, 1000 + n, fault == "memory"))))
        for fault, wait, prompt_id in todo:
            if fault == "interrupt":
                time.sleep(0.3 * wait)
                server.post("/interrupt", {})
            status = server.finished(prompt_id)["status"]
            last, data = status["messages"][-1]
            ended[last] += 1
            if fault == "memory" and last != "execution_interrupted":
                assert last == "execution_error" and "OutOfMemory" in data["exception_type"], status
                assert "injected at the switch" in data["exception_message"]
            elif fault != "memory":
                assert last in ("execution_success", "execution_interrupted"), status
        assert server.get("/queue") == {"queue_running": [], "queue_pending": []}
        found = pictures(server, KINDS)
        after, resident_after = memory(server)
    assert ended["execution_error"] and ended["execution_success"] and sum(ended.values()) == prompts
    assert after == alive
    assert "Run" not in after and "Composite" not in after
    assert resident_after <= resident * (1 + SLACK), (resident, resident_after)
    with running(tree, base) as fresh:
        expected = pictures(fresh, KINDS[::-1])
    assert [kind for kind in KINDS if found[kind] != expected[kind]] == []
    assert len(set(expected.values())) == len(KINDS)
    record_property("ended", dict(ended))
    record_property("resident megabytes", [round(each / 2**20) for each in (resident, resident_after)])
    print(f"\n{prompts} prompts: {dict(ended)}; resident {resident >> 20} then {resident_after >> 20} MiB; {after}")

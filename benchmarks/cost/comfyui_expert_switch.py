"""What a switch of LoRA experts does to the weights of their base in ComfyUI, merged and beside them: bytes, counted.

    .comfyui/venv/bin/python benchmarks/cost/comfyui_expert_switch.py

Needs the environment of ``make test-comfyui``. A random Wan network and two experts of rank 64 on all linear layers of
its blocks, in ComfyUI's own model management on a CPU, where moving is free and therefore counted: the parameters that
it asks to be moved to the host and to the device, and those that are computed anew. "half": half of the network fits,
as on a small card: the rest is streamed in every step, and its LoRA merged there each time. Prints JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from pdmd_core.experts import lora_to_file
from pdmd_core.families import family
from tests.comfyui import install
from tests.helpers.comfyui.in_process import load_pack
from tests.helpers.comfyui.phased_models import TWO, sample, sigmas_of
from tests.helpers.comfyui.server import make_base
from tests.helpers.comfyui.tiny_models import TinyModels, save_lora
from tests.helpers.tiny import transformer
from tests.helpers.tiny_pipelines import random_lora

SIZES = {"num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 2048, "num_layers": 12}
RANK, REPETITIONS = 64, 3


class Counter:
    """Bytes of parameters since the last reset: moved ones only where they are elsewhere."""

    def __init__(self) -> None:
        self.bytes = {"to host": 0, "to device": 0, "computed anew": 0}
        self._on_device = set[tuple[int, str]]()
        self._unpatching = 0

    def watch(self, stack: ExitStack) -> None:
        import comfy.model_patcher

        patcher, module = comfy.model_patcher.ModelPatcher, torch.nn.Module
        move, unpatch, compute = module.to, patcher.unpatch_model, patcher.patch_weight_to_device

        def to(own: Any, *args: Any, **kwargs: Any) -> Any:
            for layer in own.modules():
                for name, parameter in layer.named_parameters(recurse=False):
                    self._move((id(layer), name), parameter.nbytes)
            return move(own, *args, **kwargs)

        def unpatch_model(own: Any, *args: Any, **kwargs: Any) -> Any:
            self._unpatching += 1
            try:
                return unpatch(own, *args, **kwargs)
            finally:
                self._unpatching -= 1

        def patch_weight(own: Any, key: str, *args: Any, **kwargs: Any) -> Any:
            if key in own.patches:
                self.bytes["computed anew"] += own.model.get_parameter(key).nbytes
            return compute(own, key, *args, **kwargs)

        stack.enter_context(patch.object(module, "to", to))
        stack.enter_context(patch.object(patcher, "unpatch_model", unpatch_model))
        stack.enter_context(patch.object(patcher, "patch_weight_to_device", patch_weight))

    def _move(self, place: tuple[int, str], size: int) -> None:
        there = place in self._on_device
        if self._unpatching and there:
            self._on_device.remove(place)
            self.bytes["to host"] += size
        elif not self._unpatching and not there:
            self._on_device.add(place)
            self.bytes["to device"] += size

    def take(self) -> dict[str, float]:
        """Megabytes, and begin anew."""
        found = {name: round(value / 1e6, 1) for name, value in self.bytes.items()}
        self.bytes = dict.fromkeys(self.bytes, 0)
        return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        base = make_base(Path(folder) / "base")
        pack, wan = load_pack(install.tree(install.NEWEST), base), family("wan")
        models = TinyModels(base)
        network = transformer(0, **SIZES)
        size = sum(value.nbytes for value in network.state_dict().values())
        for k in range(2):
            state = random_lora(network, RANK, k + 1, wan.lora_targets)
            path = save_lora(base / f"models/loras/expert_{k}.safetensors", lora_to_file(state, float(RANK), wan))
        model = models.wan(0, **SIZES)
        rows = [
            measure(pack, models, model, weights, size if share == "all" else size // 2, share)
            for share in ("all", "half")
            for weights in ("merged", "beside")
        ]
        sizes = {"network": round(size / 1e6, 1), "a LoRA": round(path.stat().st_size / 1e6, 1)}
    print(json.dumps({"megabytes": sizes, "rows": rows}, indent=1))


def measure(pack: Any, models: Any, model: Any, weights: str, fits: int, share: str) -> dict[str, Any]:
    """One row: what the switch of a run in a warm server does, and its seconds beside those of a step."""
    import comfy.model_management as management
    import comfy.sampler_helpers

    plan = pack.call("PhasedDMDPlanFromSteps", steps="2, 2", shift=5.0, names="")[0]
    inputs: dict[str, Any] = {f"lora_{k}": f"expert_{k - 1}.safetensors" if k < 3 else "none" for k in range(1, 5)}
    inputs |= {f"strength_{k}": 1.0 for k in range(1, 5)}
    node = {"plan": plan, "cfg": "", "set_shift": True, "lora_weights": weights}
    composed = pack.call("PhasedDMDExpertsLoRA", model=model, **node, **inputs)[0]
    counter, switches, seconds, steps = Counter(), list[dict[str, float]](), list[float](), list[float]()
    prepare = comfy.sampler_helpers.prepare_sampling
    network = type(model.model.diffusion_model)
    forward = network.forward

    def prepared(*args: Any, **kwargs: Any) -> Any:
        counter.take()
        start = time.process_time()
        result = prepare(*args, **kwargs)
        seconds.append(time.process_time() - start)
        switches.append(counter.take())
        return result

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        result = forward(*args, **kwargs)
        steps.append(time.process_time() - start)
        return result

    management.unload_all_models()
    with ExitStack() as stack:
        counter.watch(stack)
        stack.enter_context(patch.object(comfy.sampler_helpers, "prepare_sampling", prepared))
        stack.enter_context(patch.object(network, "forward", timed))
        if share == "half":
            room = fits + management.minimum_inference_memory()

            def free(device: Any = None, torch_free_too: bool = False) -> Any:
                found = room - model.model.model_loaded_weight_memory
                return (found, found) if torch_free_too else found

            stack.enter_context(patch.object(management, "is_device_cpu", lambda device: False))
            stack.enter_context(patch.object(management, "vram_state", management.VRAMState.NORMAL_VRAM))
            stack.enter_context(patch.object(management, "get_free_memory", free))
        latent = {"samples": torch.zeros(1, 16, 3, 16, 16)}
        for _ in range(REPETITIONS):
            sample(pack, models, composed, "wan", sigmas_of(TWO), latent=latent)
    at_switch = switches[1::2]
    assert all(each == at_switch[-1] for each in at_switch[1:])
    return {
        "fits": share,
        "lora_weights": weights,
        "switch, MB": at_switch[-1],
        "switch, s": round(min(seconds[1::2]), 3),
        "step, s": round(sorted(steps[4:])[len(steps[4:]) // 2], 3),
    }


if __name__ == "__main__":
    main()

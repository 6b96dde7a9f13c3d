"""A node pack for tests, put beside ours: out of memory at the switch of experts on demand, and a count of what lives.

It is loaded by ComfyUI alone (a copy of this file is a folder's ``__init__.py``), so it knows nothing of ours.
"""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import comfy.sampler_helpers
from aiohttp import web
from server import PromptServer


def _out_of_memory(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around one run: the second time that a network is to be loaded in it, the memory is full."""
    prepare, calls = comfy.sampler_helpers.prepare_sampling, []

    def full(*inner: Any, **more: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise comfy.model_management.OOM_EXCEPTION("injected at the switch")
        return prepare(*inner, **more)

    comfy.sampler_helpers.prepare_sampling = full
    try:
        return executor(*args, **kwargs)
    finally:
        comfy.sampler_helpers.prepare_sampling = prepare


class OutOfMemoryAtTheSwitch:
    """MODEL to MODEL; the next run of it ends at its switch."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "patch", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model: Any) -> tuple[Any]:
        model = model.clone()
        kind = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
        model.add_wrapper_with_key(kind, "fault", _out_of_memory)
        return (model,)


@PromptServer.instance.routes.get("/faults/alive")
async def _alive(request: web.Request) -> web.Response:
    """How many objects of the classes that hold networks there are, and the bytes of all tensors."""
    import torch

    gc.collect()
    counts: Counter[str] = Counter()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        kind = type(thing).__name__
        if kind in ("ModelPatcher", "ModelPatcherDynamic", "Composite", "Run", "CFGGuider", "WAN21", "VAE", "CLIP"):
            counts[kind] += 1
        elif isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return web.json_response({**counts, "tensor_bytes": sum(storages.values())})


NODE_CLASS_MAPPINGS = {"OutOfMemoryAtTheSwitch": OutOfMemoryAtTheSwitch}

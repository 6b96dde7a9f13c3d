"""ComfyUI in this process: the node pack as its own loader loads it, and calls of core nodes and ours."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Pack:
    """The loaded node pack."""

    name: str
    """The module name that ComfyUI gave it."""

    def module(self, name: str) -> ModuleType:
        """``module("comfy_nodes.composite")``, the very module that the nodes use."""
        return importlib.import_module(f"{self.name}.{name}")

    def call(self, node: str, **inputs: Any) -> Any:
        """Execute a node, core's or ours; returns the tuple of its outputs."""
        import nodes

        kind = nodes.NODE_CLASS_MAPPINGS[node]
        if hasattr(kind, "define_schema"):
            kind = kind.PREPARE_CLASS_CLONE(None) if hasattr(kind, "PREPARE_CLASS_CLONE") else kind
            result = kind.execute(**inputs)
        else:
            result = getattr(kind(), kind.FUNCTION)(**inputs)
        if inspect.iscoroutine(result):
            result = asyncio.run(result)
        return result if isinstance(result, tuple) else result.args


def load_pack(tree: Path, base: Path) -> Pack:
    """Import ComfyUI on CPU from its tree and let it load ``base/custom_nodes/phased-dmd``."""
    sys.path.insert(1, str(tree))
    arguments, sys.argv = sys.argv, ["main.py", "--cpu", "--base-directory", str(base)]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
    finally:
        sys.argv = arguments
    importlib.import_module("utils.install_util")  # before nodes, which puts a folder with another utils on the path
    import nodes

    path = str(base / "custom_nodes" / "phased-dmd")

    async def load() -> bool:
        await nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False)
        return await nodes.load_custom_node(path)

    import server

    loop = asyncio.new_event_loop()
    server.PromptServer(loop)
    loaded = loop.run_until_complete(load())
    assert loaded, "ComfyUI could not load the pack: see its log"
    return Pack(path.replace(".", "_x_"))

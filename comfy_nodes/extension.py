"""The node list that ComfyUI asks for."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io


class PhasedDMDExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return []

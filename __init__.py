"""Phased DMD as a ComfyUI node pack; see comfy_nodes/. Nothing heavy is imported here."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():  # type: ignore[no-untyped-def]
    """What ComfyUI calls to get the nodes."""
    from .comfy_nodes.extension import PhasedDMDExtension

    return PhasedDMDExtension()

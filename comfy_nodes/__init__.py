"""ComfyUI nodes of Phased DMD. Imported by ComfyUI only, through ``comfy_entrypoint`` of the repository's root."""

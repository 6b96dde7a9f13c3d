"""Phased DMD as a ComfyUI node pack; see comfy_nodes/. Nothing heavy is imported here."""

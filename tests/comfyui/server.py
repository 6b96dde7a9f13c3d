"""The real ComfyUI server as a process of its own, and the HTTP calls of its users."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 600
"""Seconds that anything may take on a busy machine."""


def make_base(folder: Path) -> Path:
    """An empty base directory with this repository linked as its only node pack."""
    for name in ("custom_nodes", "models/diffusion_models", "models/loras", "models/phased_experts", "input", "output"):
        (folder / name).mkdir(parents=True)
    (folder / "custom_nodes/phased-dmd").symlink_to(REPOSITORY)
    return folder

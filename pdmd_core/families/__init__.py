"""Model families by name. ``family("wan")``; each module is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

from .base import Conditioning, ModelFamily, TeacherRouting

FAMILIES = {
    "qwen_image": ("qwen_image", "QwenImageFamily"),
    "wan": ("wan", "WanFamily"),
    "z_image": ("z_image", "ZImageFamily"),
}
"""Name of a family to its module here and class there."""


def family(name: str) -> ModelFamily:
    """The family of this name. Raises ValueError that names the known ones."""
    if name not in FAMILIES:
        raise ValueError(f"unknown model family {name!r}, expected one of: {', '.join(sorted(FAMILIES))}")
    module, attribute = FAMILIES[name]
    found: ModelFamily = getattr(import_module(f".{module}", __name__), attribute)()
    return found


def family_of(architecture: str) -> ModelFamily:
    """The family whose network is this diffusers class. Raises ValueError that names the known ones."""
    known = {found.architecture: found for found in map(family, FAMILIES)}
    if architecture not in known:
        raise ValueError(f"no model family for {architecture!r}, expected one of: {', '.join(sorted(known))}")
    return known[architecture]


__all__ = ["FAMILIES", "Conditioning", "ModelFamily", "TeacherRouting", "family", "family_of"]

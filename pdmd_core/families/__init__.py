"""Model families by name: ``family("wan")``. A family's module is imported when it is first asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module

from .base import Conditioning, ModelFamily
from .lora_keys import LoraKeys
from .module_names import ModuleNames
from .routing import TeacherRouting

FAMILIES = {
    "chroma": "ChromaFamily",
    "flux": "FluxFamily",
    "flux2": "Flux2Family",
    "hunyuan_video_15": "HunyuanVideo15Family",
    "ltx2": "Ltx2Family",
    "ltx_video": "LtxVideoFamily",
    "qwen_image": "QwenImageFamily",
    "stable_diffusion_3": "StableDiffusion3Family",
    "wan": "WanFamily",
    "z_image": "ZImageFamily",
}
"""Name of a family, which is also that of its module in this package, to its class there."""


def family(name: str) -> ModelFamily:
    """Find a family by its name.

    Args:
        name: A key of ``FAMILIES``, as manifests carry it.

    Returns:
        The family.

    Raises:
        ValueError: If there is none; the message lists the known ones.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown model family {name!r}, expected one of: {', '.join(sorted(FAMILIES))}")
    found: ModelFamily = getattr(import_module(f".{name}", __name__), FAMILIES[name])()
    return found


def family_of(architecture: str) -> ModelFamily:
    """Find the family whose network is a given diffusers class.

    Args:
        architecture: Name of the class, for example ``type(pipeline.transformer).__name__``.

    Returns:
        The family.

    Raises:
        ValueError: If there is none; the message lists the known ones.
    """
    found = known_family(architecture)
    if found is None:
        known = ", ".join(sorted(each.architecture for each in _all()))
        raise ValueError(f"no model family for {architecture!r}, expected one of: {known}")
    return found


def known_family(architecture: str) -> ModelFamily | None:
    """Find the family whose network is a given diffusers class, where experts may also be of a network of no family.

    Args:
        architecture: Name of the class.

    Returns:
        The family, or None.
    """
    return next((each for each in _all() if each.architecture == architecture), None)


def lora_family(architecture: str) -> ModelFamily | None:
    """Find the family whose LoRA files a network of a given diffusers class takes.

    Args:
        architecture: Name of the class.

    Returns:
        The family, or None.
    """
    return next((e for e in _all() if architecture in (e.architecture, *e.extensions)), None)


def family_of_lora(modules: Sequence[str]) -> ModelFamily | None:
    """Find the family that a LoRA file is of.

    Args:
        modules: Names of all modules that the file adapts, with whatever prefix its author's program gave them.

    Returns:
        The family, or None where the names do not tell.
    """
    return next((each for each in _all() if modules and each.owns_lora(modules)), None)


def _all() -> Iterator[ModelFamily]:
    return map(family, FAMILIES)


__all__ = [
    "FAMILIES",
    "Conditioning",
    "LoraKeys",
    "ModelFamily",
    "ModuleNames",
    "TeacherRouting",
    "family",
    "family_of",
    "family_of_lora",
    "known_family",
    "lora_family",
]

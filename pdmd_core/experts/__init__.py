"""Expert files: the manifest, the weights, the model card.

What needs torch is imported when it is first used, so that the command ``phased-dmd`` can say what to install.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .errors import ExpertsError
from .format.manifest import MANIFEST_NAME, BaseModel, Expert, Manifest, read_manifest

if TYPE_CHECKING:
    from .folder import PhasedExperts
    from .format.lora_keys import lora_from_file, lora_to_file
    from .writing import write_experts

_HOMES = {
    "PhasedExperts": "folder",
    "lora_from_file": "format.lora_keys",
    "lora_to_file": "format.lora_keys",
    "write_experts": "writing",
}
"""Public name to the module that has it, of those that need torch."""

__all__ = [
    "MANIFEST_NAME",
    "BaseModel",
    "Expert",
    "ExpertsError",
    "Manifest",
    "PhasedExperts",
    "lora_from_file",
    "lora_to_file",
    "read_manifest",
    "write_experts",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)

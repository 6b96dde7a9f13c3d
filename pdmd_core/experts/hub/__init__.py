"""Experts on the Hugging Face Hub: ``push_experts``, ``check_push`` and ``download_experts``, imported when used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .download import download_experts
    from .push import check_push, push_experts

__all__ = ["check_push", "download_experts", "push_experts"]
_PLACES = {"check_push": "push", "download_experts": "download", "push_experts": "push"}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)

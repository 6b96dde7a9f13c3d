"""What needs one network and is given a MODEL of several: refused, with what to do, instead of done to the first."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from comfy.patcher_extension import CallbacksMP

from .errors import NodeError
from .language import said


def refuse_what_needs_one_network(model: Any, key: str, names: str) -> None:
    """Make a composed MODEL, and all clones of it that still carry its experts, refuse to be merged or saved.

    Args:
        model: The MODEL.
        key: The key of its attachment.
        names: The names of its experts, for the errors.
    """
    carries = f"this MODEL carries phased experts ({names})"
    merged = (
        f"{carries}, whose weights cannot be merged as those of one network: merge the MODEL of each expert before "
        "Phased Experts"
    )
    saved = f"{carries}, and this file holds one network: save the MODEL of each expert before Phased Experts"

    def guard(patcher: Any) -> None:
        if patcher.get_attachment(key) is None:
            return
        patcher.get_key_patches = _refused_by_prefix(patcher, "get_key_patches", merged)
        patcher.model_state_dict = _refused_by_prefix(patcher, "model_state_dict", saved)
        patcher.state_dict_for_saving = _refused(saved)
        patcher.partially_load = _refused_when_forced(patcher, saved)

    guard(model)
    model.add_callback_with_key(CallbacksMP.ON_CLONE, key, lambda _, clone: guard(clone))


def _refused_by_prefix(patcher: Any, name: str, text: str) -> Callable[..., Any]:
    """Refuse to give the weights of the network, which nodes ask for by their prefix; a run itself asks for all."""
    method, itself = getattr(type(patcher), name), weakref.ref(patcher)  # a MODEL that held itself would never go

    def method_of_all(filter_prefix: str | None = None) -> Any:
        if filter_prefix is not None:
            raise NodeError(said(text))
        return method(itself())

    return method_of_all


def _refused_when_forced(patcher: Any, text: str) -> Callable[..., Any]:
    """Refuse to patch the weights for good, which old versions of ComfyUI do before they save them."""
    method, itself = type(patcher).partially_load, weakref.ref(patcher)

    def partially_load(*args: Any, force_patch_weights: bool = False, **inputs: Any) -> Any:
        if force_patch_weights:
            raise NodeError(said(text))
        return method(itself(), *args, **inputs)

    return partially_load


def _refused(text: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NodeError(said(text))

    return refuse

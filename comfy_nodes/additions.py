"""What users put on a MODEL after it was composed of experts, put on each of them.

Experts on one base share a network, so that everything fits all of them. Of experts with networks of their own, what is
data or takes the network as an argument fits all; a method of a module is bound to the same module of each network, and
compiled modules are compiled anew. Anything else that refers to the first expert's network is refused before a run
starts.
"""

from __future__ import annotations

import functools
import types
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP

from .errors import NodeError
from .model_options import copied, with_added_options

BOUND_TO_RUN = frozenset({"to_load_options", "registered_hooks"})
"""Options that ComfyUI sets for one run of one MODEL."""
_COMPILED, _COMPILE_OPTIONS = "torch.compile", "torch_compile_kwargs"
_MISSING = object()
_PARTS = (
    "model_options",
    "wrappers",
    "callbacks",
    "patches",
    "object_patches",
    "injections",
    "weight_wrapper_patches",
    "additional_models",
    "attachments",
    "force_cast_weights",
    "patches_uuid",
)
"""What patching changes of a MODEL. (Old versions of ComfyUI have no wrappers of weights.)"""


@dataclass(frozen=True)
class PatchSnapshot:
    """The first expert's patches when the composite was made; what is there beyond them is meant for all experts."""

    parts: Mapping[str, Any]
    """Copies of what patching changes, by the name of the attribute."""

    @classmethod
    def of(cls, model: Any) -> PatchSnapshot:
        """Take a copy of a MODEL's patches."""
        return cls({name: copied(getattr(model, name, {})) for name in _PARTS})


def with_additions(expert: Any, carrier: Any, snapshot: PatchSnapshot, name: str) -> Any:
    """Put what was added to the composed MODEL onto a clone of an expert's MODEL.

    Args:
        expert: The expert's own MODEL.
        carrier: The composed MODEL.
        snapshot: What the composed MODEL had when it was made.
        name: The expert's name, for errors.

    Returns:
        The clone.

    Raises:
        NodeError: If something was added that is made for the first expert's network alone.
    """
    then, shared = snapshot.parts, expert.model is carrier.model
    result = expert.clone()
    skip = BOUND_TO_RUN if shared else BOUND_TO_RUN | {_COMPILED}
    for part in ("model_options", "wrappers", "callbacks"):
        setattr(result, part, with_added_options(getattr(result, part), getattr(carrier, part), then[part], skip))
    if not shared:
        _compile(result, carrier, then)
    for path, value in carrier.object_patches.items():
        if path != "model_sampling" and then["object_patches"].get(path, _MISSING) is not value:
            result.add_object_patch(path, value if shared else _for_network(value, path, carrier, result, name))
    result.add_object_patch("model_sampling", carrier.get_model_object("model_sampling"))
    for key, entries in getattr(carrier, "injections", {}).items():
        if entries != then["injections"].get(key):
            if not shared and any(_refers_to_network(entry) for entry in entries):
                raise _refusal(f"the injection {key!r}", name)
            result.set_injections(key, [*entries])
    for key, models in getattr(carrier, "additional_models", {}).items():
        if key not in then["additional_models"]:
            result.set_additional_models(key, [each.clone() for each in models])
    for key, value in carrier.attachments.items():
        if key not in then["attachments"]:
            result.set_attachments(key, value)
    _add_to_weights(result, carrier, then, shared, name)
    return result


def _add_to_weights(result: Any, carrier: Any, then: Mapping[str, Any], shared: bool, name: str) -> None:
    """Patches and wrappers of weights, and the precision that they are computed in."""
    changed = False
    for part in ("patches", "weight_wrapper_patches"):
        own = getattr(result, part, {})
        both = with_added_options(own, getattr(carrier, part, {}), then[part])
        for key, entries in both.items():
            new = entries[len(own.get(key, ())) :]
            changed |= bool(new)
            if part == "weight_wrapper_patches" and not shared and any(_refers_to_network(entry) for entry in new):
                raise _refusal(f"the wrapper of the weight {key!r}", name)
        if changed:
            setattr(result, part, both)
    if carrier.force_cast_weights and not then["force_cast_weights"]:
        result.force_cast_weights = changed = True
    if changed:  # equal changes, equal name: ComfyUI then knows in the next run that the weights are the same
        alike = shared and result.patches_uuid == then["patches_uuid"]
        result.patches_uuid = (
            carrier.patches_uuid if alike else uuid.uuid5(result.patches_uuid, str(carrier.patches_uuid))
        )


def _compile(result: Any, carrier: Any, then: Mapping[str, Any]) -> None:
    """Compile the same modules of this network as ComfyUI's node compiled of the first one."""
    wrappers = carrier.wrappers.get(WrappersMP.APPLY_MODEL, {}).get(_COMPILED, [])
    old = then["wrappers"].get(WrappersMP.APPLY_MODEL, {}).get(_COMPILED, [])
    options = carrier.model_options.get(_COMPILE_OPTIONS)
    if not wrappers or any(wrappers[-1] is other for other in old) or options is None:
        return
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    modules = next((cell for cell in _cells(wrappers[-1]) if isinstance(cell, dict)), {})
    set_torch_compile_wrapper(result, keys=list(modules), **options)


def _for_network(value: Any, path: str, carrier: Any, result: Any, name: str) -> Any:
    """The patch of an object for another network than it was made for."""
    if isinstance(value, types.MethodType) and isinstance(value.__self__, torch.nn.Module):
        own = {id(module): place for place, module in carrier.model.named_modules()}.get(id(value.__self__))
        if own is not None and not _refers_to_network(value.__func__):
            return types.MethodType(value.__func__, result.model.get_submodule(own))
    if _refers_to_network(value):
        raise _refusal(f"the patch of {path!r}", name)
    return value


def _refusal(what: str, name: str) -> NodeError:
    return NodeError(
        f"{what} was made for the first expert's network and cannot be put onto that of expert {name}: put the node "
        "that makes it before Phased Experts, onto the MODEL of each expert"
    )


def _refers_to_network(value: Any) -> bool:
    """Whether modules, tensors or MODELs can be reached from a value: from closures, defaults and attributes."""
    known, waiting = set[int](), [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, torch.nn.Module | torch.Tensor | comfy.model_patcher.ModelPatcher):
            return True
        if id(each) not in known:
            known.add(id(each))
            waiting += _reached(each)
    return False


def _reached(value: Any) -> Iterator[Any]:
    if isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, types.FunctionType):
        yield from (*_cells(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif not isinstance(value, type | types.ModuleType):
        yield from getattr(value, "__dict__", {}).values()


def _cells(function: Any) -> Iterator[Any]:
    for cell in getattr(function, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue

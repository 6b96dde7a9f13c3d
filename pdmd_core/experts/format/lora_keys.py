"""The LoRA key format that every tool reads, between roles and files.

LoRA files hold ``diffusion_model.<native module>.lora_down.weight`` / ``.lora_up.weight`` and ``.alpha``, so that
strength 1.0 is right in diffusers' ``load_lora_weights`` and in ComfyUI's LoRA loaders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ...families import ModelFamily
from ..errors import ExpertsError
from .manifest import Expert
from .untrusted import shown

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "diffusion_model."
"""What every key of a LoRA file starts with."""
_PARTS = {".lora_down.weight": "lora_A", ".lora_up.weight": "lora_B", ".alpha": "alpha"}


def lora_to_file(state: Mapping[str, Tensor], alpha: float, names: ModelFamily) -> dict[str, Tensor]:
    """Put the weights of a LoRA role under the keys of a file.

    Args:
        state: ``<module>.lora_A``, of shape (rank, in), and ``<module>.lora_B``, of shape (out, rank), by diffusers'
            module names.
        alpha: The LoRA's alpha; its product is scaled by alpha / rank.
        names: The family, which knows the native module names.

    Returns:
        The tensors of the file, on the CPU.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        module, _, part = key.rpartition(".")
        native = PREFIX + names.native_module_name(module)
        tensors[f"{native}.lora_{'down' if part == 'lora_A' else 'up'}.weight"] = value.contiguous().cpu()
        tensors[f"{native}.alpha"] = torch.tensor(float(alpha))
    return tensors


def lora_from_file(tensors: Mapping[str, Tensor], expert: Expert, names: ModelFamily) -> dict[str, Tensor]:
    """Read a LoRA file back, the inverse of ``lora_to_file``.

    Args:
        tensors: The tensors of the file by its keys.
        expert: The manifest's entry, against whose rank, alpha and targets they are checked.
        names: The family, which knows diffusers' module names.

    Returns:
        ``<module>.lora_A`` and ``<module>.lora_B`` by diffusers' module names.

    Raises:
        ExpertsError: If a key, rank, alpha or module is not what the manifest says.
    """
    state: dict[str, Tensor] = {}
    modules: dict[str, str] = {}
    for module, parts in check_lora(tensors, expert).items():
        try:
            name = modules[module] = names.diffusers_module_name(module)
        except ValueError as error:
            raise ExpertsError(f"{expert.file}: {error}") from None
        state |= {f"{name}.{part}": value for part, value in parts.items()}
    _check_targets(modules, expert)
    return state


def check_lora(tensors: Mapping[str, Tensor], expert: Expert) -> dict[str, dict[str, Tensor]]:
    """Check a LoRA file against the manifest, so that nothing is scaled wrongly or left out without a word.

    Args:
        tensors: The tensors of the file by its keys.
        expert: The manifest's entry.

    Returns:
        Native module name to its ``lora_A`` and ``lora_B``.

    Raises:
        ExpertsError: If a module lacks a part, or if a rank or alpha is not the manifest's.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        module, part = _split(key)
        if not part:
            raise ExpertsError(
                f"{expert.file}: key {shown(key)} is not {PREFIX}<module>.lora_down|lora_up.weight or .alpha"
            )
        if part == "alpha":
            alpha = float(expert.alpha or 0)
            if value.numel() != 1 or not abs(float(value) - alpha) <= 1e-3 * abs(alpha):
                raise ExpertsError(f"{expert.file}: {key} is not the manifest's alpha {expert.alpha}")
        elif value.ndim != 2 or value.shape[0 if part == "lora_A" else 1] != expert.rank:
            raise ExpertsError(f"{expert.file}: {key} has shape {tuple(value.shape)}, expected rank {expert.rank}")
        found.setdefault(module, {})[part] = value
    whole = [parts for parts in found.values() if len(parts) == len(_PARTS)]
    if len(whole) != len(found) or not found:
        raise ExpertsError(
            f"{expert.file}: every adapted module needs lora_down, lora_up and alpha, {len(whole)} of {len(found)} "
            "modules have them: export or download it again"
        )
    return {module: {part: parts[part] for part in ("lora_A", "lora_B")} for module, parts in found.items()}


def _check_targets(modules: Mapping[str, str], expert: Expert) -> None:
    """Check that the file (native to diffusers names) adapts just the modules that the manifest targets."""
    if expert.targets is None:
        return
    unused = set(expert.targets)
    for native, name in modules.items():
        hit = matching(name, expert.targets) | matching(PREFIX + native, expert.targets)
        if not hit:
            raise ExpertsError(f"{expert.file}: adapts {name}, which is none of the manifest's targets")
        unused -= hit
    if unused:
        raise ExpertsError(
            f"{expert.file}: adapts nothing for the manifest's target {shown(min(unused))}: a part of it is missing"
        )


def matching(module: str, targets: Iterable[str]) -> set[str]:
    """Find the targets that a module ends in, as peft reads them.

    Args:
        module: A module name with dots.
        targets: Ends of module names.

    Returns:
        Those of the targets that match.
    """
    return {target for target in targets if module == target or module.endswith(f".{target}")}


def _split(key: str) -> tuple[str, str]:
    for suffix, part in _PARTS.items():
        if key.startswith(PREFIX) and key.endswith(suffix):
            return key[len(PREFIX) : -len(suffix)], part
    return key, ""

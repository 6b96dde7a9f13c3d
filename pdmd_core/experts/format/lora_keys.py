"""LoRA files, between the roles of a training and the names that a family's files have.

LoRA files hold ``<prefix><native module>`` with the suffixes of the family's ``LoraKeys``, so that strength 1.0 is
right in diffusers' ``load_lora_weights`` and in ComfyUI's LoRA loaders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ...families import LoraKeys, ModelFamily
from ..errors import ExpertsError
from .manifest import Expert
from .untrusted import shown

if TYPE_CHECKING:
    from torch import Tensor


def lora_to_file(state: Mapping[str, Tensor], alpha: float, names: ModelFamily) -> dict[str, Tensor]:
    """Put the weights of a LoRA role under the keys of the family's files.

    Args:
        state: ``<module>.lora_A``, of shape (rank, in), and ``<module>.lora_B``, of shape (out, rank), by diffusers'
            module names.
        alpha: The LoRA's alpha; its product is scaled by alpha / rank.
        names: The family, which knows the native module names and the keys.

    Returns:
        The tensors of the file, on the CPU. The alpha by which they count is that of ``names.lora_keys.alpha_in_file``,
        which the manifest has to say.
    """
    import torch

    keys = names.lora_keys
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        module, _, part = key.rpartition(".")
        native = keys.prefix + names.native_module_name(module)
        if keys.alpha:
            tensors[native + keys.alpha] = torch.tensor(float(alpha))
        elif part == "lora_B" and alpha != value.shape[1]:
            value = (value.float() * (alpha / value.shape[1])).to(value.dtype)
        tensors[native + (keys.down if part == "lora_A" else keys.up)] = value.contiguous().cpu()
    return tensors


def lora_from_file(tensors: Mapping[str, Tensor], expert: Expert, names: ModelFamily) -> dict[str, Tensor]:
    """Read a LoRA file back, the inverse of ``lora_to_file``.

    Args:
        tensors: The tensors of the file by its keys.
        expert: The manifest's entry, against whose rank, alpha and targets they are checked.
        names: The family, which knows diffusers' module names and the keys.

    Returns:
        ``<module>.lora_A`` and ``<module>.lora_B`` by diffusers' module names.

    Raises:
        ExpertsError: If a key, rank, alpha or module is not what the manifest says.
    """
    state: dict[str, Tensor] = {}
    modules: dict[str, str] = {}
    for module, parts in check_lora(tensors, expert, names.lora_keys).items():
        try:
            name = modules[module] = names.diffusers_module_name(module)
        except ValueError as error:
            raise ExpertsError(f"{expert.file}: {error}") from None
        state |= {f"{name}.{part}": value for part, value in parts.items()}
    _check_targets(modules, expert, names.lora_keys)
    return state


def check_lora(tensors: Mapping[str, Tensor], expert: Expert, keys: LoraKeys) -> dict[str, dict[str, Tensor]]:
    """Check a LoRA file against the manifest, so that nothing is scaled wrongly or left out without a word.

    Args:
        tensors: The tensors of the file by its keys.
        expert: The manifest's entry.
        keys: How files of the family name their tensors.

    Returns:
        Native module name to its ``lora_A`` and ``lora_B``.

    Raises:
        ExpertsError: If a module lacks a part, or if a rank or alpha is not the manifest's.
    """
    if expert.alpha != keys.alpha_in_file(expert.rank or 0, expert.alpha or 0.0):
        raise ExpertsError(
            f"{expert.file}: LoRA files of this family carry no alpha, which is their rank {expert.rank} then, the "
            f"manifest says {expert.alpha}: export or download it again"
        )
    suffixes = {keys.down: "lora_A", keys.up: "lora_B", **({keys.alpha: "alpha"} if keys.alpha else {})}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        suffix = next((each for each in suffixes if key.endswith(each)), None)
        if suffix is None or not key.startswith(keys.prefix):
            known = f"{keys.prefix}<module>{'|'.join(suffixes)}"
            raise ExpertsError(f"{expert.file}: key {shown(key)} is not {known}")
        module, part = key.removeprefix(keys.prefix).removesuffix(suffix), suffixes[suffix]
        if part == "alpha":
            alpha = float(expert.alpha or 0)
            if value.numel() != 1 or not abs(float(value) - alpha) <= 1e-3 * abs(alpha):
                raise ExpertsError(f"{expert.file}: {key} is not the manifest's alpha {expert.alpha}")
        elif value.ndim != 2 or value.shape[0 if part == "lora_A" else 1] != expert.rank:
            raise ExpertsError(f"{expert.file}: {key} has shape {tuple(value.shape)}, expected rank {expert.rank}")
        found.setdefault(module, {})[part] = value
    whole = [parts for parts in found.values() if len(parts) == len(suffixes)]
    if len(whole) != len(found) or not found:
        *others, last = (suffix.strip(".").removesuffix(".weight") for suffix in suffixes)
        raise ExpertsError(
            f"{expert.file}: every adapted module needs {', '.join(others)} and {last}, {len(whole)} of {len(found)} "
            "modules have them: export or download it again"
        )
    return {module: {part: parts[part] for part in ("lora_A", "lora_B")} for module, parts in found.items()}


def _check_targets(modules: Mapping[str, str], expert: Expert, keys: LoraKeys) -> None:
    """Check that the file (native to diffusers names) adapts just the modules that the manifest targets."""
    if expert.targets is None:
        return
    unused = set(expert.targets)
    for native, name in modules.items():
        hit = matching(name, expert.targets) | matching(keys.prefix + native, expert.targets)
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

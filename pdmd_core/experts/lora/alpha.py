"""Alpha where a LoRA file has it in its metadata, under any of the names that programs give it, or not at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ExpertsError
from ..format.untrusted import parse_json, shown

_NAMES = ("alpha", "lora_alpha", "network_alpha", "ss_network_alpha")
_DOCUMENTS = ("lora_adapter_metadata", "adapter_config", "lora_config")
"""Keys whose values are JSON, in which alpha is one of many settings."""


@dataclass(frozen=True)
class Alphas:
    """The alpha of modules that have none beside them; without one it is the rank."""

    every: float | None = None
    """That of all modules."""
    of_module: Mapping[str, float] = field(default_factory=dict)
    """Module, or the end of its name, to an alpha of its own."""
    by_root: bool = False
    """Whether the product is scaled by alpha over the square root of the rank (rsLoRA)."""

    def scale(self, module: str, rank: int, own: float | None) -> float:
        """Tell the factor of a module's product.

        Args:
            module: The module, with whatever prefix its file gives it.
            rank: Its rank.
            own: The alpha beside it.

        Returns:
            The factor.
        """
        if own is not None:
            return own / rank
        alpha = next(
            (a for end, a in self.of_module.items() if module == end or module.endswith(f".{end}")), self.every
        )
        if alpha is None:
            return 1.0
        return alpha / math.sqrt(rank) if self.by_root else alpha / rank


def alphas_in(metadata: Mapping[str, str], config: Mapping[str, Any] | None = None) -> Alphas:
    """Read alpha from metadata.

    Args:
        metadata: The texts in the header of a LoRA file.
        config: The ``adapter_config.json`` that lies beside the files of PEFT.

    Returns:
        What they say of alpha.

    Raises:
        ExpertsError: If they say different alphas, or one that is not a positive number.
    """
    found: dict[str, float] = {}
    of_module: dict[str, float] = {}
    by_root = False
    documents: list[tuple[str, Mapping[str, Any]]] = [("", metadata)]
    documents += [(f"{name}: ", document) for name in _DOCUMENTS if (document := _document(metadata.get(name)))]
    if config:
        documents.append(("adapter_config.json: ", config))
    for where, document in documents:
        for key, value in document.items():
            component, _, name = key.rpartition(".")  # diffusers puts the component before it
            if component.startswith("text_encoder"):
                continue
            if name in _NAMES and (alpha := _number(value, where + key)) is not None:
                found[where + key] = alpha
            elif name == "alpha_pattern" and isinstance(value, dict):
                each = {module: _number(alpha, f"{where}{key}.{module}") for module, alpha in value.items()}
                of_module |= {module.strip("^$").replace("\\", ""): a for module, a in each.items() if a is not None}
            elif name == "use_rslora":
                by_root = str(value).lower() == "true"
    if len(set(found.values())) > 1:
        said = ", ".join(f"{shown(name)} is {alpha:g}" for name, alpha in found.items())
        raise ExpertsError(f"the metadata have more than one alpha ({said}): put an .alpha tensor beside each module")
    return Alphas(next(iter(found.values()), None), of_module, by_root)


def _document(text: str | None) -> Mapping[str, Any] | None:
    try:
        found = parse_json(text or "null")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _number(value: object, where: str) -> float | None:
    """A positive number, also in words; None where nothing is said."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "none", "null", "dynamic")):
        return None
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ExpertsError(f"{where} in the metadata is a positive number, found {shown(value)}")
    return number

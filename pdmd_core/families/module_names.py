"""The weights of a family's network under every name that LoRA files give them.

Layouts: ``native`` (of the original code and ComfyUI), ``diffusers``, and ``kohya``, in which dots became underscores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

PREFIXES = (
    "base_model.model.model.diffusion_model.",
    "base_model.model.diffusion_model.",
    "base_model.model.transformer.",
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer_2.",
    "transformer.",
    "unet.",
    "lora_unet__",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
"""What LoRA files put before a module's name, longest first; some put nothing."""


@dataclass(frozen=True)
class Place:
    """Where a name of a LoRA file is in diffusers' network."""

    names: tuple[str, ...]
    """Modules, or parameters; several where one module of the native layout is several in diffusers."""
    is_parameter: bool = False
    """Whether they are parameters of no module of their own, such as a table that is added."""
    shares: tuple[int, ...] = (1,)
    """The sizes of several modules in relation to each other."""


@dataclass(frozen=True)
class ModuleNames:
    """Names of everything in a network that LoRA files change."""

    blocks: tuple[str, ...] = ()
    """Names of the network's lists of blocks in diffusers."""
    in_block: Mapping[str, str] = field(default_factory=dict)
    """Modules of a block: names in diffusers to native names."""
    outside: Mapping[str, str] = field(default_factory=dict)
    """Modules outside the blocks: names in diffusers to native names."""
    block_parameters: Mapping[str, str] = field(default_factory=dict)
    """Parameters of a block that are no module's: names in diffusers to native names."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Such parameters outside the blocks."""
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Modules of a block that other tools have under another name, or as one: their name there to the modules in
    diffusers whose outputs it lists one after the other."""
    shares: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Those of ``joined`` whose parts are not equally large, to the parts' sizes in relation to each other."""
    other_blocks: Mapping[str, str] = field(default_factory=dict)
    """Names that other tools have for the lists of blocks, to those in diffusers."""
    other_outside: Mapping[str, str] = field(default_factory=dict)
    """Names that other tools have for modules outside the blocks, to those in diffusers."""
    prefix: str = "diffusion_model."
    """What files in the native layout put before a name, so that ComfyUI reads them."""
    flat_prefix: str = "lora_unet_"
    """What files of kohya put before it, so that ComfyUI reads them."""

    def place(self, name: str) -> Place | None:
        """Find what a name of a LoRA file means.

        Args:
            name: A module or parameter in any layout, with or without a prefix of ``PREFIXES``.

        Returns:
            Its place in diffusers' network, or None where the family has no such name.
        """
        for prefix in (*PREFIXES, ""):
            if name.startswith(prefix) and (found := self._place(name.removeprefix(prefix))):
                return found
        return None

    def native(self, name: str, is_parameter: bool = False) -> str | None:
        """Translate a module or parameter of diffusers' network.

        Args:
            name: Its name in diffusers.
            is_parameter: Whether it is a parameter of no module of its own.

        Returns:
            Its native name, or None where it has none.
        """
        block, inner = self._split(name)
        tables = (self.block_parameters, self.parameters) if is_parameter else (self.in_block, self.outside)
        found = tables[0 if block else 1].get(inner)
        return None if found is None else block + found

    def native_weight(self, name: str) -> str | None:
        """Translate any weight of diffusers' network.

        Args:
            name: Its name in diffusers.

        Returns:
            Its native name, or None where it has none.
        """
        module, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            return self.native(name, is_parameter=True)
        native = self.native(module)
        return None if native is None else f"{native}.{kind}"

    @cached_property
    def _modules(self) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
        """All spellings of modules, of a block and outside: to names in diffusers."""
        others = {other: (own,) for other, own in self.other_outside.items()}
        return _spellings(self.in_block, self.joined), _spellings(self.outside, others)

    @cached_property
    def _parameters(self) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
        return _spellings(self.block_parameters, {}), _spellings(self.parameters, {})

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        spellings = (*self.blocks, *self.other_blocks)
        return re.compile(rf"({'|'.join(map(re.escape, spellings))})[._](\d+)[._](.+)")

    def _split(self, name: str) -> tuple[str, str]:
        """The block in diffusers with its number and a dot, and the rest; no block where the name is outside."""
        match = self._pattern.fullmatch(name) if self.blocks else None
        if not match:
            return "", name
        return f"{self.other_blocks.get(match[1], match[1])}.{match[2]}.", match[3]

    def _place(self, name: str) -> Place | None:
        block, inner = self._split(name)
        for is_parameter, spellings in ((False, self._modules), (True, self._parameters)):
            names = spellings[0 if block else 1].get(inner)
            if names is not None:
                joined = next((key for key, parts in self.joined.items() if parts == names), "")
                shares = self.shares.get(joined, (1,) * len(names))
                return Place(tuple(block + each for each in names), is_parameter, shares)
        return None


def _spellings(names: Mapping[str, str], joined: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Native, diffusers' and flattened names to those of diffusers; a native name goes before one of diffusers."""
    found = {own: (own,) for own in names} | {native: (own,) for own, native in names.items()} | dict(joined)
    return {name.replace(".", "_"): own for name, own in found.items()} | found

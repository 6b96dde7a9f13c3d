"""The weights of a family's network under every name that LoRA files give them.

Layouts: ``native`` (of the original code and ComfyUI), ``diffusers``, and ``kohya``, in which dots became underscores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from .native_layout import NativeLayout

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
    swapped: bool = False
    """Whether the file has the halves of its rows in the other order."""


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
    other_outside: Mapping[str, str] = field(default_factory=dict)
    """Names that other tools have for modules outside the blocks, to those in diffusers."""
    layout: NativeLayout | None = None
    """The native layout where it joins modules of diffusers; it has all names then, and files in the native layout have
    joined products."""
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
        if self.layout is not None:
            found = self.layout.find(name)
            return None if found is None else found.name
        module, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            return self.native(name, is_parameter=True)
        native = self.native(module)
        return None if native is None else f"{native}.{kind}"

    @cached_property
    def _joined(self) -> dict[str, tuple[str, ...]]:
        """Native modules of a block to those in diffusers; without those of which a file does not tell the order."""
        found = {} if self.layout is None else self.layout.joined()
        unclear = () if self.layout is None else self.layout.swapped_in_last
        return {native: parts for native, parts in found.items() if not set(parts) & set(unclear)} | dict(self.joined)

    @cached_property
    def _modules(self) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
        """All spellings of modules, of a block and outside: to names in diffusers."""
        known, outside = dict(self.in_block), dict(self.outside)
        if self.layout is not None:
            known |= {own: own for parts in self.layout.joined().values() for own in parts}
            outside |= {own: native for native, own in self.layout.outside.items()}
        others = {other: (own,) for other, own in self.other_outside.items()}
        return _spellings(known, self._joined), _spellings(outside, others)

    @cached_property
    def _parameters(self) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
        return _spellings(self.block_parameters, {}), _spellings(self.parameters, {})

    @cached_property
    def _lists(self) -> dict[str, str]:
        """Every spelling of a list of blocks to its name in diffusers."""
        found = {name: name for name in self.blocks}
        for blocks in () if self.layout is None else self.layout.blocks:
            found |= {blocks.own: blocks.own, blocks.native: blocks.own}
        return {name.replace(".", "_"): own for name, own in found.items()} | found

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(rf"({'|'.join(map(re.escape, self._lists))})[._](\d+)[._](.+)")

    def _split(self, name: str) -> tuple[str, str]:
        """The block in diffusers with its number and a dot, and the rest; no block where the name is outside."""
        match = self._pattern.fullmatch(name) if self._lists else None
        if not match:
            return "", name
        return f"{self._lists[match[1]]}.{match[2]}.", match[3]

    def _place(self, name: str) -> Place | None:
        block, inner = self._split(name)
        for is_parameter, spellings in ((False, self._modules), (True, self._parameters)):
            names = spellings[0 if block else 1].get(inner)
            if names is None:
                continue
            if self.layout is None:
                return Place(tuple(block + each for each in names), is_parameter, (1,) * len(names))
            joined = next((key for key, parts in self._joined.items() if parts == names), "")
            shares = self.layout.shares.get(joined, (1,) * len(names))
            original = not block and inner.replace(".", "_") != names[0].replace(".", "_")
            swapped = original and names[0] in self.layout.swapped
            return Place(tuple(block + each for each in names), is_parameter, shares, swapped)
        return None


def _spellings(names: Mapping[str, str], joined: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Native, diffusers' and flattened names to those of diffusers; a native name goes before one of diffusers."""
    found = {own: (own,) for own in names} | {native: (own,) for own, native in names.items()} | dict(joined)
    return {name.replace(".", "_"): own for name, own in found.items()} | found

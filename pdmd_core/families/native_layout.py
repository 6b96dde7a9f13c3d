"""The weights of the original code, which ComfyUI loads, where one of them has the rows of several of diffusers'."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class NativeWeight:
    """A weight of the native layout."""

    name: str
    """Its name."""
    sources: tuple[str, ...]
    """The weights of diffusers whose rows it has, one after the other."""
    shares: tuple[int, ...] = (1,)
    """How many rows each of them has, in relation to each other."""
    swapped: bool = False
    """Whether the second half of the rows stands before the first: shift before scale, or the other way round."""


@dataclass(frozen=True)
class NativeBlocks:
    """A list of blocks."""

    own: str
    """Its name in diffusers."""
    native: str
    """Its name in the native layout."""
    modules: Mapping[str, tuple[str, ...]]
    """Modules of a block: native names to the modules in diffusers whose rows they have, one after the other."""

    @cached_property
    def holder(self) -> dict[str, str]:
        """Module in diffusers to the native one that has its rows."""
        return {own: native for native, parts in self.modules.items() for own in parts}


@dataclass(frozen=True)
class NativeLayout:
    """Where every weight of diffusers' network lies in the network of the original code."""

    blocks: tuple[NativeBlocks, ...]
    """The lists of blocks."""
    outside: Mapping[str, str]
    """Modules outside the blocks: native names to those in diffusers."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Parameters that are no module's weight or bias: native names to those in diffusers."""
    shares: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Native modules of a block whose parts are not equally large, to the parts' sizes in relation to each other."""
    swapped: Collection[str] = ()
    """Modules outside the blocks, by their names in diffusers, whose halves are in the other order."""
    swapped_in_last: Collection[str] = ()
    """Modules that are so in the last block alone."""
    scales: tuple[str, ...] = ()
    """Ends of native modules whose weight is called ``scale``."""

    def joined(self) -> dict[str, tuple[str, ...]]:
        """List the native modules of blocks.

        Returns:
            Native names to the modules in diffusers whose rows they have.
        """
        return {native: parts for blocks in self.blocks for native, parts in blocks.modules.items()}

    def find(self, name: str, last: Mapping[str, int] | None = None) -> NativeWeight | None:
        """Find where a weight of diffusers lies.

        Args:
            name: Its name in diffusers.
            last: Lists of blocks, by their names in diffusers, to the number of the last block. Without it, weights on
                which this depends are not found.

        Returns:
            The native weight that has its rows, or None where there is none.
        """
        module, _, kind = name.rpartition(".")
        if kind in ("weight", "bias"):
            if module in self._outside:
                native, swapped = self._outside[module], module in self.swapped
                return NativeWeight(self._weight(native, kind), (name,), swapped=swapped)
            for blocks in self.blocks:
                number, _, inner = module.removeprefix(f"{blocks.own}.").partition(".")
                if module.startswith(f"{blocks.own}.") and inner in blocks.holder:
                    return self._in_block(blocks, number, inner, kind, last)
        native = next((native for native, own in self.parameters.items() if own == name), "")
        return NativeWeight(native, (name,)) if native else None

    def whole(self, names: Iterable[str]) -> list[NativeWeight]:
        """Find the native weights of a whole network.

        Args:
            names: All of its weights in diffusers.

        Returns:
            The native weights.

        Raises:
            ValueError: If a weight has no place, or if a part of a native weight is missing.
        """
        given = set(names)
        last: dict[str, int] = {}
        for blocks in self.blocks:
            found = [re.match(rf"{re.escape(blocks.own)}\.(\d+)\.", name) for name in given]
            last[blocks.own] = max((int(match[1]) for match in found if match), default=0)
        weights: dict[str, NativeWeight] = {}
        for name in sorted(given):
            weight = self.find(name, last)
            if weight is None:
                raise ValueError(f"{name!r} has no place in the native layout")
            if missing := sorted(set(weight.sources) - given):
                raise ValueError(f"{missing[0]!r} is missing, which {weight.name} is made of with {name!r}")
            weights[weight.name] = weight
        return list(weights.values())

    @cached_property
    def _outside(self) -> dict[str, str]:
        return {own: native for native, own in self.outside.items()}

    def _in_block(
        self, blocks: NativeBlocks, number: str, inner: str, kind: str, last: Mapping[str, int] | None
    ) -> NativeWeight | None:
        if last is None and inner in self.swapped_in_last:
            return None
        native = blocks.holder[inner]
        parts = blocks.modules[native]
        swapped = inner in self.swapped_in_last and last is not None and int(number) == last[blocks.own]
        sources = tuple(f"{blocks.own}.{number}.{part}.{kind}" for part in parts)
        shares = self.shares.get(native, (1,) * len(parts))
        return NativeWeight(self._weight(f"{blocks.native}.{number}.{native}", kind), sources, shares, swapped)

    def _weight(self, module: str, kind: str) -> str:
        scale = kind == "weight" and module.endswith(self.scales)
        return f"{module}.{'scale' if scale else kind}"

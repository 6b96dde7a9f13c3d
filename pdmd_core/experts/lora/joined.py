"""LoRA files for networks that have several of diffusers' layers in one weight: products beside each other as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...families.native_layout import NativeLayout, NativeWeight
from .changes import Change, Dense, LowRank, sum_of
from .file import LoraFile


def joined(file: LoraFile, layout: NativeLayout) -> LoraFile:
    """Bring the changes of diffusers' weights into the weights of the native layout, exactly.

    Products of n layers that lie in one weight become one: their projections to the rank stand one below the other,
    those from the rank on the diagonal, so that its rank is the sum of theirs. It stays theirs where all of them have
    the same projection to the rank, as in files that were trained on the native network.

    Args:
        file: What it changes, by diffusers' weights.
        layout: Where these lie.

    Returns:
        The changes by native weights; keys without a place there are added to those left out.
    """
    parts: dict[str, tuple[NativeWeight, dict[str, list[Change]]]] = {}
    keys: dict[str, list[str]] = {}
    left_out = list(file.left_out)
    for name, changes in file.weights.items():
        place = layout.find(name)
        if place is None:
            left_out += file.keys[name]
            continue
        native = place.name.removesuffix(".scale")
        parts.setdefault(native, (place, {}))[1][name] = changes
        keys.setdefault(native, []).extend(key for key in file.keys[name] if key not in keys.get(native, ()))
    weights = {native: _together(place, found) for native, (place, found) in parts.items()}
    return replace(file, weights=weights, keys=keys, left_out=left_out)


def _together(place: NativeWeight, found: dict[str, list[Change]]) -> list[Change]:
    """The changes of one native weight."""
    products: list[LowRank | None] = []
    differences: list[Dense | None] = []
    for source in place.sources:
        changes = found.get(source, [])
        low = [change for change in changes if isinstance(change, LowRank)]
        plain = [change for change in changes if isinstance(change, Dense)]
        products.append(sum_of(low) if low else None)
        differences.append(_sum(plain) if plain else None)
    whole: list[Change] = []
    if any(products):
        whole.append(_product(products, place.shares))
    if any(differences):
        whole.append(_difference(differences, place.shares))
    return [change.swapped() if place.swapped else change for change in whole]


def _product(parts: Sequence[LowRank | None], shares: Sequence[int]) -> LowRank:
    given = [part for part in parts if part is not None]
    if len(parts) == 1:
        return given[0]
    first = given[0]
    if any(part.scale != first.scale for part in given):
        parts = [part and LowRank(part.down, part.scale * part.up.float(), 1.0) for part in parts]
        given = [part for part in parts if part is not None]
    dtype = given[0].factors()[0].dtype
    for each in given:
        dtype = torch.promote_types(dtype, each.factors()[0].dtype)
    heights = _heights([None if part is None else len(part.up) for part in parts], shares)
    alike = all(part.down.shape == first.down.shape and torch.equal(part.down, first.down) for part in given)
    rank = len(first.down) if alike else sum(len(part.down) for part in given)
    up, row, column = torch.zeros(sum(heights), rank, dtype=dtype), 0, 0
    for part, height in zip(parts, heights, strict=True):
        if part is not None:
            own = part.factors()[1].to(dtype)
            up[row : row + height, column : column + own.shape[1]] = own
            column += 0 if alike else own.shape[1]
        row += height
    down = first.down if alike else torch.cat([part.down.to(dtype) for part in given])
    return LowRank(down.to(dtype), up, given[0].scale)


def _difference(parts: Sequence[Dense | None], shares: Sequence[int]) -> Dense:
    given = [part for part in parts if part is not None]
    if len(parts) == 1:
        return given[0]
    heights = _heights([None if part is None else len(part.value) for part in parts], shares)
    rest = given[0].value.shape[1:]
    rows = [
        torch.zeros(height, *rest) if part is None else part.dense()
        for part, height in zip(parts, heights, strict=True)
    ]
    return Dense(torch.cat(rows))


def _sum(changes: Sequence[Dense]) -> Dense:
    return changes[0] if len(changes) == 1 else Dense(torch.stack([change.dense() for change in changes]).sum(0))


def _heights(known: Sequence[int | None], shares: Sequence[int]) -> list[int]:
    """How many rows each part has, also one that does not change."""
    unit = next(height // share for height, share in zip(known, shares, strict=True) if height is not None)
    return [share * unit if height is None else height for height, share in zip(known, shares, strict=True)]

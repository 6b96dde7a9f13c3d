"""What a module of a LoRA file adds to the weights of a network: products of low rank, or plain differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..errors import ExpertsError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """``scale * up @ down`` is added to a matrix."""

    down: Tensor
    """Of shape (rank, in)."""
    up: Tensor
    """Of shape (out, rank)."""
    scale: float
    """The factor of the product."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        return self.up.shape[0], self.down.shape[1]

    def scaled(self, strength: float) -> LowRank:
        """Multiply the change.

        Args:
            strength: The factor.

        Returns:
            The stronger or weaker change.
        """
        return replace(self, scale=self.scale * strength)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Bring both factors into one dtype in which torch multiplies.

        Returns:
            down and up, without the scale.
        """
        dtypes = [torch.bfloat16 if half.dtype.itemsize == 1 else half.dtype for half in (self.down, self.up)]
        dtype = torch.promote_types(*dtypes)
        return self.down.to(dtype), self.up.to(dtype)

    def scaled_factors(self) -> tuple[Tensor, Tensor]:
        """Multiply the scale into the factors, bit for bit as diffusers' loaders do.

        Returns:
            down and up, whose product is what is added.
        """
        down, up = self.factors()
        of_down, of_up = abs(self.scale), 1.0
        while 0 < of_down * 2 < of_up:
            of_down, of_up = of_down * 2, of_up / 2
        return down * math.copysign(of_down, self.scale), up * of_up

    def rows(self, part: int, shares: Sequence[int]) -> LowRank:
        """Take one of several parts of the rows.

        Args:
            part: Its index.
            shares: The sizes of all parts in relation to each other.

        Returns:
            The change of these rows, without the ranks that only other rows have.
        """
        if len(shares) == 1:
            return self
        up = _rows(self.up, part, shares)
        used = up.any(0) if up.dtype.itemsize > 1 else up.float().any(0)
        if used.all() or not used.any():
            return replace(self, up=up)
        return replace(self, down=self.down[used], up=up[:, used])

    def swapped(self) -> LowRank:
        """Put the second half of the rows before the first.

        Returns:
            The change of the rows in this order.
        """
        return replace(self, up=torch.cat(self.up.chunk(2)[::-1]))

    def dense(self) -> Tensor:
        """Multiply out.

        Returns:
            What is added, in float32.
        """
        return self.scale * (self.up.float() @ self.down.float())


@dataclass(frozen=True)
class Dense:
    """``scale * value`` is added to a weight of any shape."""

    value: Tensor
    """Of the weight's shape."""
    scale: float = 1.0
    """Its factor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return tuple(self.value.shape)

    def scaled(self, strength: float) -> Dense:
        """Multiply the change.

        Args:
            strength: The factor.

        Returns:
            The stronger or weaker change.
        """
        return replace(self, scale=self.scale * strength)

    def rows(self, part: int, shares: Sequence[int]) -> Dense:
        """Take one of several parts of the rows.

        Args:
            part: Its index.
            shares: The sizes of all parts in relation to each other.

        Returns:
            The change of these rows.
        """
        return replace(self, value=_rows(self.value, part, shares))

    def swapped(self) -> Dense:
        """Put the second half of the rows before the first.

        Returns:
            The change of the rows in this order.
        """
        return replace(self, value=torch.cat(self.value.chunk(2)[::-1]))

    def dense(self) -> Tensor:
        """Multiply by the factor.

        Returns:
            What is added, in float32.
        """
        return self.scale * self.value.float()


def _rows(value: Tensor, part: int, shares: Sequence[int]) -> Tensor:
    first, last = (len(value) * sum(shares[:end]) // sum(shares) for end in (part, part + 1))
    return value[first:last]


Change = LowRank | Dense
"""A change of one weight."""


def rank_of(parts: Mapping[str, Tensor]) -> int | None:
    """Tell the rank by which a module's alpha is divided.

    Args:
        parts: Meaning, as in ``keys.MEANINGS``, to tensor.

    Returns:
        The rank; None where nothing is a product.
    """
    factor = next((parts[name] for name in ("down", "LoHa w1_b", "LoKr w2_b", "LoKr w1_b") if name in parts), None)
    return None if factor is None or not factor.ndim else factor.shape[0] or None


def changes_of_module(parts: Mapping[str, Tensor], scale: float, where: str) -> dict[str, list[Change]]:
    """Read what the parts of one module add.

    Args:
        parts: Meaning, as in ``keys.MEANINGS``, to tensor, without alpha.
        scale: The factor of products.
        where: File and module, for errors.

    Returns:
        ``weight`` and ``bias``, those that change, to their changes.

    Raises:
        ExpertsError: If parts are missing, do not fit each other, or are of a kind that is not applied.
    """
    found: dict[str, list[Change]] = {}
    rest = dict(parts)
    if "down" in rest or "up" in rest:
        found["weight"] = [_pair(_take(rest, "down", where), _take(rest, "up", where), scale, where)]
        if "up bias" in rest:
            found["bias"] = [Dense(rest.pop("up bias"), scale)]
    for kind, read in (("LoHa", _loha), ("LoKr", _lokr)):
        own = {name.removeprefix(f"{kind} "): rest.pop(name) for name in list(rest) if name.startswith(kind)}
        if own:
            try:
                if any(factor.ndim < 2 for factor in own.values()):
                    raise RuntimeError("a factor is a matrix")
                found.setdefault("weight", []).append(read(own, scale))
            except (KeyError, RuntimeError) as error:
                raise ExpertsError(f"{where}: its {kind} is not whole, or its parts do not fit ({error})") from None
    for name in ("weight", "bias"):
        if f"{name} difference" in rest:
            found.setdefault(name, []).append(Dense(rest.pop(f"{name} difference")))
    if rest:
        kinds = ", ".join(sorted(rest))
        advice = "merge it into its base and use full experts" if "DoRA" in rest else "leave it out, or convert it"
        raise ExpertsError(f"{where}: {kinds} is no change that is added to weights, which is not applied: {advice}")
    return found


def _take(parts: dict[str, Tensor], name: str, where: str) -> Tensor:
    if name not in parts:
        raise ExpertsError(f"{where}: not a LoRA file: every module needs a down and an up projection")
    return parts.pop(name)


def _pair(down: Tensor, up: Tensor, scale: float, where: str) -> Change:
    if down.ndim < 2 or up.ndim < 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise ExpertsError(f"{where}: not a LoRA file: down (rank, in) and up (out, rank) do not fit, found {shapes}")
    if down.ndim == 2 and up.ndim == 2:
        return LowRank(down, up, scale)
    if up.flatten(2).shape[2:].numel() > 1:
        raise ExpertsError(f"{where}: an up projection of shape {tuple(up.shape)} is not read")
    kernel = down.shape[2:]
    product = up.flatten(1).float() @ down.flatten(1).float()
    return Dense(product.reshape(up.shape[0], down.shape[1], *kernel), scale)


def _loha(parts: Mapping[str, Tensor], scale: float) -> Change:
    """``(w1_a @ w1_b) * (w2_a @ w2_b)``, whose rank is at most the product of both ranks."""
    up1, down1, up2, down2 = (parts[name].float() for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    if len(parts) > 4:
        raise KeyError("a Tucker decomposition (hada_t1, hada_t2) is not read")
    up = torch.einsum("or,os->ors", up1, up2).flatten(1)
    down = torch.einsum("ri,si->rsi", down1, down2).flatten(0, 1)
    return _smaller(up, down, scale)


def _lokr(parts: Mapping[str, Tensor], scale: float) -> Change:
    """``kron(w1, w2)``, each whole or a product; scaled only where one of them is a product."""
    if "t2" in parts:
        raise KeyError("a Tucker decomposition (lokr_t2) is not read")
    w1 = parts["w1"].float() if "w1" in parts else parts["w1_a"].float() @ parts["w1_b"].float()
    if "w2" in parts:
        w2 = parts["w2"].float()
        product = torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2)
        return Dense(product, 1.0 if "w1" in parts else scale)
    up, down = parts["w2_a"].float(), parts["w2_b"].float()
    return _smaller(torch.kron(w1, up), torch.kron(torch.eye(w1.shape[1]), down), scale)


def _smaller(up: Tensor, down: Tensor, scale: float) -> Change:
    """The product as factors, or multiplied out where that takes less memory."""
    if up.numel() + down.numel() < up.shape[0] * down.shape[1]:
        return LowRank(down, up, scale)
    return Dense(up @ down, scale)


def sum_of(products: Sequence[LowRank]) -> LowRank:
    """Write a sum of products as one product.

    Args:
        products: Changes of one matrix, at least one.

    Returns:
        Their sum, whose rank is the sum of their ranks.
    """
    if len(products) == 1:
        return products[0]
    down = torch.cat([product.down.float() for product in products])
    up = torch.cat([product.scale * product.up.float() for product in products], dim=1)
    return LowRank(down, up, 1.0)

"""The mixtures of the leaderboard, each with the shift of its plans."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from benchmarks.claims.mixture.mixture import GaussianMixture


@dataclass(frozen=True)
class Kind:
    """A mixture to be distilled."""

    title: str
    mixture: GaussianMixture
    shift: float


def _ring_of_rising_weights() -> GaussianMixture:
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0] * 2)
    angles = torch.arange(8) * (2 * math.pi / 8)
    return GaussianMixture(
        weights / weights.sum(), 1.4 * torch.stack([angles.cos(), angles.sin()], 1), torch.full((8,), 0.1)
    )


def _grid() -> GaussianMixture:
    """Sixteen modes, of which one has 2 % and the others the rest."""
    side = torch.tensor([-1.5, -0.5, 0.5, 1.5])
    weights = torch.full((16,), 0.98 / 15)
    weights[5] = 0.02
    return GaussianMixture(weights, torch.cartesian_prod(side, side), torch.full((16,), 0.1))


def _in_many_dimensions(dimensions: int) -> GaussianMixture:
    """Eight modes in random directions, as far from the middle as those of the ring are in each dimension."""
    directions = torch.randn(8, dimensions, generator=torch.Generator().manual_seed(0))
    centres = directions / directions.norm(dim=1, keepdim=True) * 0.99 * dimensions**0.5
    ring = GaussianMixture.ring()
    return GaussianMixture(ring.weights, centres, 2 * ring.deviations)


KINDS = {
    "ring": Kind("ring of falling weights, shift 1", GaussianMixture.ring(), 1.0),
    "rising": Kind("ring of weights 1 2 3 4 1 2 3 4, shift 5", _ring_of_rising_weights(), 5.0),
    "grid": Kind("grid of 16, one of 2 %, shift 5", _grid(), 5.0),
    "sixteen": Kind("8 modes in 16 dimensions, shift 5", _in_many_dimensions(16), 5.0),
    "ring_3": Kind("ring of falling weights, shift 3", GaussianMixture.ring(), 3.0),
    "ring_5": Kind("ring of falling weights, shift 5", GaussianMixture.ring(), 5.0),
    "ring_7": Kind("ring of falling weights, shift 7", GaussianMixture.ring(), 7.0),
}

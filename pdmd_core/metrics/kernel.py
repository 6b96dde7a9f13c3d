"""Kernel distance between two sets of features (Binkowski et al. 2018, arXiv 1801.01401).

Unbiased, so it can be compared between different sample counts, unlike the Frechet distance. In Inception features it
is called KID: name it after the network that made the features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .features import check_pair


def polynomial_discrepancy(first: Tensor, second: Tensor) -> float:
    """Squared maximum mean discrepancy, unbiased, with the kernel ``(x . y / dimensions + 1)^3``.

    Features (samples, dimensions), computed in float64. 0 in expectation for equal distributions, where it is below 0
    as often as above. Raises ValueError for features that cannot be compared.
    """
    check_pair(first, second)
    first, second = first.double(), second.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        matrix = kernel(x, x)
        return (matrix.sum() - matrix.trace()) / (len(x) * (len(x) - 1))

    return float(within(first) + within(second) - 2 * kernel(first, second).mean())


@dataclass(frozen=True)
class KernelDistance:
    """Mean over random subsets and its error."""

    value: float
    deviation: float
    """Standard deviation over the subsets, as papers report it beside KID."""
    subsets: int
    subset_size: int


def kernel_distance(
    first: Tensor, second: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """``polynomial_discrepancy`` of random subsets without replacement; at most as large as the smaller set is."""
    check_pair(first, second)
    if subsets < 2 or subset_size < 2:
        raise ValueError(f"a kernel distance takes at least 2 subsets of 2 samples, found {subsets} of {subset_size}")
    size = min(subset_size, len(first), len(second))
    generator = torch.Generator().manual_seed(seed)

    def some(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:size]]

    values = torch.tensor([polynomial_discrepancy(some(first), some(second)) for _ in range(subsets)]).double()
    return KernelDistance(float(values.mean()), float(values.std()), subsets, size)

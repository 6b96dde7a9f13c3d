"""The kernel distance between two sets of features (Binkowski et al. 2018, arXiv 1801.01401).

It is unbiased, so that values of different sample counts can be compared, unlike the Frechet distance. In Inception
features it is called KID: name it after the network that made the features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .features import check_pair
from .intervals import Estimate, quantiles


def polynomial_discrepancy(first: Tensor, second: Tensor) -> float:
    """Estimate the squared maximum mean discrepancy with the kernel ``(x . y / dimensions + 1)^3``.

    The estimate is unbiased and computed in float64. Source: Binkowski et al. 2018, arXiv 1801.01401.

    Args:
        first: Features of shape (samples, dimensions).
        second: Features of shape (samples, dimensions).

    Returns:
        The discrepancy; 0 in expectation for equal distributions, where it is below 0 as often as above.

    Raises:
        ValueError: If the features cannot be compared.
    """
    check_pair(first, second)
    first, second = first.double(), second.double()

    def within(x: Tensor) -> Tensor:
        matrix = _kernel(x, x)
        return (matrix.sum() - matrix.trace()) / (len(x) * (len(x) - 1))

    return float(within(first) + within(second) - 2 * _kernel(first, second).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_estimate(first: Tensor, second: Tensor, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Compute ``polynomial_discrepancy`` with a 95 % percentile bootstrap interval over the samples of both sets.

    A sample that is drawn twice is not compared with itself, so that resampling adds no bias.

    Args:
        first: Features of shape (samples, dimensions).
        second: Features of shape (samples, dimensions).
        resamples: The number of bootstrap resamples.
        seed: The seed of the resampling.

    Returns:
        The discrepancy with its interval.

    Raises:
        ValueError: If the features cannot be compared.
    """
    check_pair(first, second)
    sets = [first.double().cpu(), second.double().cpu()]
    generator = torch.Generator().manual_seed(seed)
    draws = [_multiplicities(len(features), resamples, generator) for features in sets]
    within = [_mean_over_pairs(_kernel(x, x).fill_diagonal_(0), w) for x, w in zip(sets, draws, strict=True)]
    between = ((draws[0] @ _kernel(*sets)) * draws[1]).sum(1) / (len(sets[0]) * len(sets[1]))
    values = within[0] + within[1] - 2 * between
    low, high = quantiles(values[values.isfinite()])  # of very few samples, a resample may be one sample and no pair
    value = polynomial_discrepancy(*sets)
    # two or three samples have resamples that are all elsewhere, or are equal but for rounding
    return Estimate(value, min(low, value), max(high, value), min(len(first), len(second)))


def _multiplicities(count: int, resamples: int, generator: torch.Generator) -> Tensor:
    """Count how often each of the samples is in each resample: shape (resamples, count)."""
    drawn = torch.randint(count, (resamples, count), generator=generator)
    return torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())


def _mean_over_pairs(matrix: Tensor, weights: Tensor) -> Tensor:
    """The mean of a matrix without its diagonal over pairs weighted by both weights, for each row of weights."""
    pairs = weights.sum(1).square() - weights.square().sum(1)
    return ((weights @ matrix) * weights).sum(1) / pairs


@dataclass(frozen=True)
class KernelDistance:
    """The mean kernel distance over random subsets, and how much it varies."""

    value: float
    """The mean over the subsets."""
    deviation: float
    """The standard deviation over the subsets, as papers report it beside KID."""
    subsets: int
    """The number of subsets."""
    subset_size: int
    """The number of samples in each subset."""


def kernel_distance(
    first: Tensor, second: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Compute ``polynomial_discrepancy`` of random subsets, drawn without replacement.

    Args:
        first: Features of shape (samples, dimensions).
        second: Features of shape (samples, dimensions).
        subsets: The number of subsets, at least 2.
        subset_size: The number of samples in each subset, at least 2; the smaller set's size where that is less.
        seed: The seed of the subsets.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        ValueError: If the features cannot be compared, or if fewer than 2 subsets of 2 samples are asked for.

    Examples:
        >>> import torch
        >>> features = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> near = kernel_distance(features[:100], features[100:], subsets=10, subset_size=50)
        >>> far = kernel_distance(features[:100], features[100:] + 1, subsets=10, subset_size=50)
        >>> near.value < far.value
        True
    """
    check_pair(first, second)
    if subsets < 2 or subset_size < 2:
        raise ValueError(f"a kernel distance takes at least 2 subsets of 2 samples, found {subsets} of {subset_size}")
    size = min(subset_size, len(first), len(second))
    generator = torch.Generator().manual_seed(seed)

    def some(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:size]]

    values = torch.tensor([polynomial_discrepancy(some(first), some(second)) for _ in range(subsets)]).double()
    return KernelDistance(float(values.mean()), float(values.std()), subsets, size)

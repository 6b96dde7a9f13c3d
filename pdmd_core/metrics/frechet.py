"""The Frechet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500).

The value depends on the network that made the features: name the distance after it, as in "FD-EffLite0".
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .features import check_pair
from .intervals import CorrectedEstimate, Estimate, bootstrap_corrected


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Compute the Frechet distance between Gaussians fitted to two sets of features.

    The distance is ``|mean_1 - mean_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))``. It is computed in float64 from
    symmetric square roots or singular values, so that it is never complex. It is biased upwards for few samples:
    compare at equal counts, beside the distance between two sets of the reference (the noise floor). Source: Heusel et
    al. 2017, arXiv 1706.08500.

    Args:
        first: Features of shape (samples, dimensions).
        second: Features of shape (samples, dimensions).

    Returns:
        The distance, at least 0, in squared units of the features; 0 for equal sets.

    Raises:
        ValueError: If there are fewer than two samples, values that are not finite, or different dimensions.

    Examples:
        >>> import torch
        >>> features = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
        >>> round(frechet_distance(features, features + 1), 4)  # a shift by 1 in 8 dimensions
        8.0
    """
    check_pair(first, second)
    first, second = first.double(), second.double()
    shift = (first.mean(0) - second.mean(0)).square().sum()
    # C_1 = a^T a and C_2 = b^T b
    a, b = ((features - features.mean(0)) / (len(features) - 1) ** 0.5 for features in (first, second))
    if min(len(a), len(b)) < a.shape[1]:  # the trace of the root is the sum of the singular values of a b^T
        cross = torch.linalg.svdvals(a @ b.T).sum()
    else:
        root = _square_root(a.T @ a)
        cross = torch.linalg.eigvalsh(root @ (b.T @ b) @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float(shift + a.square().sum() + b.square().sum() - 2 * cross))


def frechet_estimate(
    first: Tensor, second: Tensor, seeds: tuple[int, int] = (1, 1), resamples: int = 200, seed: int = 0
) -> CorrectedEstimate:
    """Compute the Frechet distance as it is, and without the bias of few samples and with a 95 % interval.

    The raw distance of few samples is too large, and a resample of them is too far again by about as much, which
    ``bootstrap_corrected`` takes off. The corrected distance and its interval are cut off at 0.

    Args:
        first: Features of shape (samples, dimensions), prompt by prompt.
        second: Features of shape (samples, dimensions), prompt by prompt.
        seeds: How many samples of each prompt the first and the second set hold. Where it is more than 1, whole seeds
            are resampled, with one sample of every prompt: samples drawn one by one would add a noise of prompts that
            no set has.
        resamples: The number of bootstrap resamples.
        seed: The seed of the resampling.

    Returns:
        ``frechet_distance`` as ``raw``, and the corrected distance with its interval, in squared units of the
        features.

    Raises:
        ValueError: If the features cannot be compared, or if a set has fewer than two samples or seeds to resample.
    """
    (first_units, of_first), (second_units, of_second) = (
        (len(features), features.__getitem__) if count == 1 else (count, functools.partial(_of_seeds, features, count))
        for features, count in zip((first, second), seeds, strict=True)
    )
    found = bootstrap_corrected(
        lambda i, j: frechet_distance(of_first(i), of_second(j)),
        first_units,
        second_units,
        resamples=resamples,
        seed=seed,
    )
    value, low, high = (max(0.0, x) for x in (found.corrected.value, found.corrected.low, found.corrected.high))
    return CorrectedEstimate(found.raw, Estimate(value, low, high, min(len(first), len(second))))


def _of_seeds(features: Tensor, count: int, chosen: Tensor) -> Tensor:
    """Pick the samples of these seeds from features that are prompt by prompt with ``count`` seeds each."""
    by_prompt: Tensor = features.unflatten(0, (-1, count))
    return by_prompt[:, chosen].flatten(0, 1)


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root

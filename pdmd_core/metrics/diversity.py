"""Diversity over seeds: how far apart samples of the same prompt are."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .intervals import Estimate, bootstrap

PairDistance = Callable[[Tensor, Tensor], Tensor]
"""A function from two batches of shape (pairs, ...) to distances (pairs,): of features, or LPIPS of pixels."""


def euclidean_distance(first: Tensor, second: Tensor) -> Tensor:
    """Compute the Euclidean distances ``|x - y|`` of pairs of features.

    Args:
        first: Features x of shape (pairs, dimensions).
        second: Features y of the same shape.

    Returns:
        Distances of shape (pairs,), in units of the features.
    """
    distances: Tensor = (first.double() - second.double()).norm(dim=1)
    return distances


def cosine_distance(first: Tensor, second: Tensor) -> Tensor:
    """Compute the cosine distances ``1 - x . y / (|x| |y|)`` of pairs of features.

    Papers report the similarity, which is 1 minus this distance (Phased DMD, arXiv 2510.27684, of DINOv3 features: a
    lower similarity is more diverse).

    Args:
        first: Features x of shape (pairs, dimensions).
        second: Features y of the same shape.

    Returns:
        Distances of shape (pairs,), in [0, 2].
    """
    first, second = F.normalize(first.double(), dim=1), F.normalize(second.double(), dim=1)
    return (first - second).square().sum(1) / 2  # exactly 0 for equal features, unlike 1 - x . y


def seed_diversity(samples: Tensor, groups: Tensor, distance: PairDistance, batch: int = 256) -> Estimate:
    """Measure the mean distance between samples of the same group, over all pairs within groups.

    A group is a prompt, whose samples differ in the seed only. The distance is 0 when all seeds give the same sample.
    The 95 % interval is a percentile bootstrap over prompts, and NaN for one prompt.

    Args:
        samples: Features or pixels of shape (count, ...).
        groups: The group of each sample, of shape (count,).
        distance: The distance of pairs of samples, for example ``euclidean_distance``.
        batch: How many pairs are compared at a time.

    Returns:
        The mean distance, in the units of ``distance``, with its interval.

    Raises:
        ValueError: If the shapes do not belong together, or if no group has two samples.

    Examples:
        >>> import torch
        >>> features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0], [1.0, 2.0]])
        >>> prompts = torch.tensor([0, 0, 1, 1])
        >>> seed_diversity(features, prompts, euclidean_distance).value
        3.0
    """
    if samples.ndim < 2 or groups.shape != samples.shape[:1]:
        raise ValueError(
            f"expected samples (count, ...) and one group each, found {tuple(samples.shape)} and {tuple(groups.shape)}"
        )
    first, second = seed_pairs(groups)
    if not len(first):
        raise ValueError("diversity needs at least two samples of one prompt: use more seeds")
    distances = torch.cat(
        [
            distance(samples[i], samples[j]).reshape(len(i)).double().cpu()
            for i, j in zip(first.split(batch), second.split(batch), strict=True)
        ]
    )
    prompts, prompt = groups[first].cpu().unique(return_inverse=True)
    sums = torch.zeros(len(prompts), dtype=torch.float64).index_add_(0, prompt, distances)
    counts = prompt.bincount()
    if len(prompts) == 1:
        return Estimate(float(distances.mean()), math.nan, math.nan, 1)
    return bootstrap(lambda i: float(sums[i].sum() / counts[i].sum()), len(prompts))


def pairwise_distance(features: Tensor, groups: Tensor) -> float:
    """Measure the mean Euclidean distance within groups: ``seed_diversity`` without an interval.

    Args:
        features: Features of shape (samples, dimensions).
        groups: The group of each sample, of shape (samples,).

    Returns:
        The mean over all pairs of samples of the same group, in units of the features.

    Raises:
        ValueError: If the shapes do not belong together, or if no group has two samples.
    """
    if features.ndim != 2:
        raise ValueError(f"expected features (samples, dimensions) and one group each, found {tuple(features.shape)}")
    return seed_diversity(features, groups, euclidean_distance, batch=65536).value


def seed_pairs(groups: Tensor) -> tuple[Tensor, Tensor]:
    """List all pairs of samples that belong to the same group.

    Args:
        groups: The group of each sample, of shape (samples,).

    Returns:
        The indices i and j of the pairs, each of shape (pairs,), with i < j.
    """
    first, second = [], []
    for group in groups.unique():
        members = (groups == group).nonzero().flatten()
        i, j = torch.triu_indices(len(members), len(members), offset=1)
        first.append(members[i])
        second.append(members[j])
    empty = torch.zeros(0, dtype=torch.long)
    return torch.cat([empty, *first]), torch.cat([empty, *second])

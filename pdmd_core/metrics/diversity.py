"""Diversity over seeds: how far apart samples of the same prompt are."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .intervals import Estimate, bootstrap

PairDistance = Callable[[Tensor, Tensor], Tensor]
"""Distances of pairs, (pairs, ...) and (pairs, ...) to (pairs,): a function of features, or LPIPS of pixels."""


def euclidean_distance(first: Tensor, second: Tensor) -> Tensor:
    """``|x - y|`` of features (pairs, dimensions), in units of the features."""
    return (first.double() - second.double()).norm(dim=1)


def cosine_distance(first: Tensor, second: Tensor) -> Tensor:
    """``1 - x . y / (|x| |y|)`` of features (pairs, dimensions), in [0, 2].

    Papers report the similarity, 1 minus this (Phased DMD, arXiv 2510.27684, of DINOv3: lower is more diverse).
    """
    first, second = F.normalize(first.double(), dim=1), F.normalize(second.double(), dim=1)
    return (first - second).square().sum(1) / 2  # exactly 0 for equal features, unlike 1 - x . y


def seed_diversity(samples: Tensor, groups: Tensor, distance: PairDistance, batch: int = 256) -> Estimate:
    """Mean distance of samples (count, ...) of the same group (count,), over all such pairs; 0 when all seeds agree.

    A group is a prompt; its members differ in the seed only. The 95 % interval is a percentile bootstrap over prompts
    (NaN for one prompt). Raises ValueError when no group has two members.
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
    """Mean Euclidean distance between features (samples, dimensions) of the same group (samples,), over all such pairs.

    ``seed_diversity`` without an interval. Raises ValueError when no group has two members.
    """
    if features.ndim != 2:
        raise ValueError(f"expected features (samples, dimensions) and one group each, found {tuple(features.shape)}")
    return seed_diversity(features, groups, euclidean_distance, batch=65536).value


def seed_pairs(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of all pairs i < j of samples of the same group (samples,)."""
    first, second = [], []
    for group in groups.unique():
        members = (groups == group).nonzero().flatten()
        i, j = torch.triu_indices(len(members), len(members), offset=1)
        first.append(members[i])
        second.append(members[j])
    empty = torch.zeros(0, dtype=torch.long)
    return torch.cat([empty, *first]), torch.cat([empty, *second])

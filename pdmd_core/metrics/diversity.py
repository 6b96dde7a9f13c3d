"""Diversity over seeds: how far apart samples of the same prompt are."""

from __future__ import annotations

import torch
from torch import Tensor


def pairwise_distance(features: Tensor, groups: Tensor) -> float:
    """Mean Euclidean distance between features (samples, dimensions) of the same group (samples,), over all such pairs.

    A group is a prompt; its members differ in the seed only. 0 when all seeds agree. Raises ValueError when no group
    has two members.
    """
    if features.ndim != 2 or groups.shape != features.shape[:1]:
        raise ValueError(
            f"expected features (samples, dimensions) and one group each, found {tuple(features.shape)} and "
            f"{tuple(groups.shape)}"
        )
    exact = "donot_use_mm_for_euclid_dist"  # the faster way makes equal features differ from 26 samples on
    distances = torch.cdist(features.double(), features.double(), compute_mode=exact)
    same = groups[:, None] == groups[None, :]
    pairs = torch.triu(same, diagonal=1)
    if not bool(pairs.any()):
        raise ValueError("diversity needs at least two samples of one prompt: use more seeds")
    return float(distances[pairs].mean())

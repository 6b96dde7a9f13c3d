"""Frechet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500).

The value depends on the network that made the features: name the distance after it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """``|mean_1 - mean_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))`` of features (samples, dimensions).

    Computed in float64 from symmetric square roots, so that it is never complex; 0 for equal sets. Raises ValueError
    for fewer than two samples, features that are not finite or of different dimensions.
    """
    for name, features in (("first", first), ("second", second)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(
                f"the {name} features have shape (samples >= 2, dimensions), found {tuple(features.shape)}"
            )
        if not bool(features.isfinite().all()):
            raise ValueError(f"the {name} features have values that are not finite")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"both sets have the same dimensions, found {first.shape[1]} and {second.shape[1]}")
    first, second = first.double(), second.double()
    covariance_1, covariance_2 = (torch.atleast_2d(torch.cov(features.T)) for features in (first, second))
    root = _square_root(covariance_1)
    cross = torch.linalg.eigvalsh(root @ covariance_2 @ root).clamp(min=0).sqrt().sum()
    shift = (first.mean(0) - second.mean(0)).square().sum()
    return max(0.0, float(shift + covariance_1.trace() + covariance_2.trace() - 2 * cross))


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T

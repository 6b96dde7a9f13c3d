"""Frechet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500).

The value depends on the network that made the features: name the distance after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .features import check_pair
from .intervals import Estimate, bootstrap


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """``|mean_1 - mean_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))`` of features (samples, dimensions).

    In squared units of the features. Computed in float64, from symmetric square roots or singular values, so that it is
    never complex; 0 for equal sets. It is biased upwards for few samples: compare at equal counts, beside the distance
    between two sets of the reference (the noise floor). Raises ValueError for fewer than two samples, features that are
    not finite or of different dimensions.
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


def frechet_estimate(first: Tensor, second: Tensor, resamples: int = 200, seed: int = 0) -> Estimate:
    """``frechet_distance`` with a 95 % interval: basic bootstrap over the samples of both sets, cut off at 0.

    The basic kind also takes the bias of few samples out of the interval, which may therefore lie below the value.
    """
    value = bootstrap(
        lambda i, j: frechet_distance(first[i], second[j]),
        len(first),
        len(second),
        kind="basic",
        resamples=resamples,
        seed=seed,
    )
    return Estimate(value.value, max(0.0, value.low), max(0.0, value.high), value.samples)


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T

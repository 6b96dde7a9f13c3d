"""Precision, recall, density and coverage: whose neighbourhoods hold whose samples.

Recall and coverage are the measures of lost diversity: the share of the reference that the samples reach.
(Kynkaanniemi et al. 2019, arXiv 1904.06991; Naeem et al. 2020, arXiv 2002.09797.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .features import check_pair
from .intervals import Estimate, share


@dataclass(frozen=True)
class Manifold:
    """Shares in [0, 1] with 95 % Wilson intervals, and the density, which is 1 on average for equal distributions.

    A neighbourhood is a closed ball to the k-th nearest neighbour in the same set, the sample itself not counted.
    Intervals are over the samples counted, given the balls.
    """

    precision: Estimate
    """Samples that lie in the neighbourhood of a reference sample."""
    recall: Estimate
    """Reference samples that lie in the neighbourhood of a sample."""
    density: float
    """Neighbourhoods of the reference that hold a sample, a sample on average, divided by k."""
    coverage: Estimate
    """Reference samples whose neighbourhood holds a sample."""
    neighbours: int


def manifold(samples: Tensor, reference: Tensor, neighbours: int = 5) -> Manifold:
    """Measure samples (count, dimensions) against the reference, with Euclidean distances of features.

    Recall and coverage depend on both counts: compare at equal counts, and beside two sets of the reference. Raises
    ValueError when a set has no more samples than ``neighbours``.
    """
    check_pair(samples, reference, at_least=neighbours + 1)
    samples, reference = samples.double(), reference.double()
    between = torch.cdist(samples, reference, compute_mode=_EXACT)
    of_samples, of_reference = _radii(samples, neighbours), _radii(reference, neighbours)
    held = between <= of_reference  # (sample, reference): the sample is in the reference's neighbourhood
    return Manifold(
        precision=share(held.any(1)),
        recall=share((between <= of_samples[:, None]).any(0)),
        density=float(held.double().sum() / (neighbours * len(samples))),
        coverage=share(held.any(0)),
        neighbours=neighbours,
    )


_EXACT = "donot_use_mm_for_euclid_dist"
"""The faster way makes equal features differ."""


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Distance to the k-th nearest other member of the set."""
    within = torch.cdist(features, features, compute_mode=_EXACT).fill_diagonal_(0)
    return within.kthvalue(neighbours + 1, dim=1).values

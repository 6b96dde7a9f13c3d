"""Precision, recall, density and coverage: whose neighbourhoods hold whose samples.

Recall and coverage are the measures of lost diversity: the share of the reference that the samples reach. (Kynkaanniemi
et al. 2019, arXiv 1904.06991; Naeem et al. 2020, arXiv 2002.09797.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .features import check_pair
from .intervals import Estimate, share


@dataclass(frozen=True)
class Manifold:
    """Precision, recall, density and coverage of samples against a reference.

    A neighbourhood is a closed ball around a sample that reaches to its k-th nearest neighbour in the same set, the
    sample itself not counted. Intervals are over the samples counted, given the balls.
    """

    precision: Estimate
    """The share of samples that lie in the neighbourhood of a reference sample, with a 95 % Wilson interval."""
    recall: Estimate
    """The share of reference samples that lie in the neighbourhood of a sample, with a 95 % Wilson interval."""
    density: float
    """How many neighbourhoods of the reference hold a sample, on average over samples, divided by k; 1 on average for
    equal distributions."""
    coverage: Estimate
    """The share of reference samples whose neighbourhood holds a sample, with a 95 % Wilson interval."""
    neighbours: int
    """The k of the neighbourhoods."""


def manifold(samples: Tensor, reference: Tensor, neighbours: int = 5) -> Manifold:
    """Measure precision, recall, density and coverage with Euclidean distances of features.

    Recall and coverage depend on both counts: compare at equal counts, and beside two sets of the reference.

    Args:
        samples: Features of shape (count, dimensions).
        reference: Features of shape (count, dimensions).
        neighbours: The k of the neighbourhoods, at least 1.

    Returns:
        The four measures.

    Raises:
        ValueError: If a set has no more samples than ``neighbours``, or if the features cannot be compared.

    Examples:
        >>> import torch
        >>> reference = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> found = manifold(reference[:100] * 0.1, reference[100:])  # samples that lost diversity
        >>> found.precision.value, found.recall.value
        (1.0, 0.0)
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
"""How distances are computed; the faster way makes equal features differ."""


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """The distance of each sample to its k-th nearest other member of the set."""
    within = torch.cdist(features, features, compute_mode=_EXACT).fill_diagonal_(0)
    return within.kthvalue(neighbours + 1, dim=1).values

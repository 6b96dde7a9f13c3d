"""How sure a measured value is: bootstrap intervals (Efron & Tibshirani 1993, chapters 13 and 14)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval; ``low`` and ``high`` are NaN where none can be given."""

    value: float
    low: float
    high: float
    samples: int
    """How many independent units it rests on: samples, clips or prompts."""


def bootstrap(
    statistic: Callable[..., float],
    *counts: int,
    kind: Literal["percentile", "basic"] = "percentile",
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """A statistic of independent units with its bootstrap interval.

    statistic: called with one index tensor for each of ``counts``, which says the units it is computed from.
    counts:    number of units of each set; sets are resampled independently of each other.
    kind:      ``percentile`` is for means; ``basic`` reflects the quantiles about the value, which takes the bias of a
               statistic that grows with resampling noise (a Frechet distance) out of the interval.

    Raises ValueError for fewer than 2 units.
    """
    if not counts or min(counts) < 2:
        raise ValueError(f"an interval needs at least 2 units in every set, found {list(counts)}")
    generator = torch.Generator().manual_seed(seed)
    value = statistic(*(torch.arange(count) for count in counts))
    draws = [
        statistic(*(torch.randint(count, (count,), generator=generator) for count in counts)) for _ in range(resamples)
    ]
    low, high = quantiles(torch.tensor(draws, dtype=torch.float64), level)
    if kind == "basic":
        low, high = 2 * value - high, 2 * value - low
    return Estimate(value, low, high, min(counts))


def quantiles(draws: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The two between which this share of the draws (resamples,) lies."""
    tail = (1 - level) / 2
    low, high = draws.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def mean_of_units(values: Tensor, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> Estimate:
    """The mean of one value for each unit, shape (units,), with a percentile bootstrap interval (NaN for one unit)."""
    values = values.double().flatten().cpu()
    count, low, high = len(values), math.nan, math.nan
    if count > 1:
        generator = torch.Generator().manual_seed(seed)
        draws = [values[torch.randint(count, (count,), generator=generator)].mean() for _ in range(resamples)]
        low, high = quantiles(torch.stack(draws), level)
    return Estimate(float(values.mean()), low, high, count)


def share(hits: Tensor, level: float = 0.95) -> Estimate:
    """The share of units that are true, boolean of shape (units,), with Wilson's score interval.

    (Wilson 1927, JASA 22; unlike the bootstrap it is right for shares of 0 and 1.)
    """
    count = hits.numel()
    if not count:
        raise ValueError("a share needs at least one unit, found none")
    value = float(hits.double().mean())
    z = float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((1 + level) / 2)))
    centre = (value + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(value * (1 - value) / count + z**2 / (4 * count**2))
    return Estimate(value, max(0.0, centre - half), min(1.0, centre + half), count)

"""Confidence intervals of measured values: bootstrap and Wilson (Efron & Tibshirani 1993, chapters 13 and 14)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A measured value with its confidence interval, which contains the value."""

    value: float
    """The measured value."""
    low: float
    """The lower end of the interval; NaN where no interval can be given."""
    high: float
    """The upper end of the interval; NaN where no interval can be given."""
    samples: int
    """The number of independent units it rests on: samples, clips or prompts."""


@dataclass(frozen=True)
class CorrectedEstimate:
    """A biased statistic as it is, and without its bias."""

    raw: float
    """The statistic of the units as they are. It has no interval: resampling adds the same bias once more."""
    corrected: Estimate
    """The statistic without the bias that resampling shows, with the interval of that."""


def bootstrap(
    statistic: Callable[..., float], *counts: int, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Compute a statistic of independent units, such as a mean, with its percentile bootstrap interval.

    Args:
        statistic: A function that is called with one tensor of indices for each of ``counts``: the units it is to be
            computed from.
        *counts: The number of units of each set. Sets are resampled independently of each other.
        resamples: The number of bootstrap resamples.
        level: The confidence level, in (0, 1).
        seed: The seed of the resampling.

    Returns:
        The statistic of all units with its interval.

    Raises:
        ValueError: If a set has fewer than 2 units.

    Examples:
        >>> import torch
        >>> lengths = torch.arange(100.0)
        >>> estimate = bootstrap(lambda i: float(lengths[i].mean()), len(lengths))
        >>> estimate.value, 43 < estimate.low < 46, 53 < estimate.high < 57
        (49.5, True, True)
    """
    value, draws = _resampled(statistic, counts, resamples, seed)
    low, high = quantiles(draws, level)
    return Estimate(value, low, high, min(counts))


def bootstrap_corrected(
    statistic: Callable[..., float], *counts: int, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> CorrectedEstimate:
    """Compute a statistic that grows with noise, such as a Frechet distance, with and without its bias.

    Resampling moves the statistic by about as much as sampling did, so the bias is what the median of the resamples
    has more than the raw value: ``corrected = 2 raw - median``. The interval is the basic bootstrap's, the quantiles
    reflected about the raw value in the same way; it contains the corrected value, to which it shrinks as the level
    goes to 0, and it need not contain the raw one. Source: Efron & Tibshirani 1993, chapter 10; Davison & Hinkley
    1997, section 5.2.

    Args:
        statistic: A function that is called with one tensor of indices for each of ``counts``.
        *counts: The number of units of each set. Sets are resampled independently of each other.
        resamples: The number of bootstrap resamples.
        level: The confidence level, in (0, 1).
        seed: The seed of the resampling.

    Returns:
        The raw statistic, and the corrected one with its interval.

    Raises:
        ValueError: If a set has fewer than 2 units.

    Examples:
        >>> import torch
        >>> units = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
        >>> found = bootstrap_corrected(lambda i: float(units[i].mean(0).square().sum()), len(units))
        >>> found.raw > 1, found.corrected.low < 0 < found.corrected.high  # the mean is 0, its square never
        (True, True)
    """
    raw, draws = _resampled(statistic, counts, resamples, seed)
    low, high = quantiles(draws, level)
    median = float(draws.quantile(0.5))
    return CorrectedEstimate(raw, Estimate(2 * raw - median, 2 * raw - high, 2 * raw - low, min(counts)))


def _resampled(
    statistic: Callable[..., float], counts: tuple[int, ...], resamples: int, seed: int
) -> tuple[float, Tensor]:
    """The statistic of all units, and of so many resamples of them, of shape (resamples,)."""
    if not counts or min(counts) < 2:
        raise ValueError(f"an interval needs at least 2 units in every set, found {list(counts)}")
    generator = torch.Generator().manual_seed(seed)
    value = statistic(*(torch.arange(count) for count in counts))
    draws = [
        statistic(*(torch.randint(count, (count,), generator=generator) for count in counts)) for _ in range(resamples)
    ]
    return value, torch.tensor(draws, dtype=torch.float64)


def quantiles(draws: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Find the two values between which this share of the draws lies.

    Args:
        draws: Values of a resampled statistic, of shape (resamples,), in float64.
        level: The share, in (0, 1).

    Returns:
        The lower and the upper value.
    """
    tail = (1 - level) / 2
    low, high = draws.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def mean_of_units(values: Tensor, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Compute the mean of one value for each unit, with a percentile bootstrap interval.

    Args:
        values: The values, of shape (units,).
        level: The confidence level, in (0, 1).
        resamples: The number of bootstrap resamples.
        seed: The seed of the resampling.

    Returns:
        The mean with its interval, which is NaN for one unit.
    """
    values = values.double().flatten().cpu()
    count, low, high = len(values), math.nan, math.nan
    if count > 1:
        generator = torch.Generator().manual_seed(seed)
        draws = [values[torch.randint(count, (count,), generator=generator)].mean() for _ in range(resamples)]
        low, high = quantiles(torch.stack(draws), level)
    return Estimate(float(values.mean()), low, high, count)


def share(hits: Tensor, level: float = 0.95) -> Estimate:
    """Compute the share of units that are true, with Wilson's score interval.

    Unlike the bootstrap, the interval is right for shares of 0 and 1. Source: Wilson 1927, JASA 22.

    Args:
        hits: Booleans of shape (units,).
        level: The confidence level, in (0, 1).

    Returns:
        The share, in [0, 1], with its interval.

    Raises:
        ValueError: If there are no units.
    """
    count = hits.numel()
    if not count:
        raise ValueError("a share needs at least one unit, found none")
    value = float(hits.double().mean())
    z = float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((1 + level) / 2)))
    centre = (value + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(value * (1 - value) / count + z**2 / (4 * count**2))
    low, high = (
        max(0.0, min(value, centre - half)),
        min(1.0, max(value, centre + half)),
    )  # but for rounding, centre +- half
    return Estimate(value, low, high, count)

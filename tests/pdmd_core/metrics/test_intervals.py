from __future__ import annotations

import math

import pytest
import torch

from pdmd_core.metrics import (
    Estimate,
    bootstrap,
    bootstrap_corrected,
    euclidean_distance,
    frechet_estimate,
    kernel_estimate,
    manifold,
    mean_of_units,
    seed_diversity,
    share,
)
from tests.helpers.tiny import randn


def exponential(count: int, seed: int) -> torch.Tensor:
    return -torch.rand(count, generator=torch.Generator().manual_seed(seed)).log()


def covered(estimates: list[Estimate], truth: float) -> float:
    return sum(e.low <= truth <= e.high for e in estimates) / len(estimates)


@pytest.mark.parametrize(("level", "low", "high"), [(0.95, 0.89, 0.98), (0.8, 0.72, 0.87)])
def test_the_interval_of_a_mean_covers_the_truth_at_its_nominal_rate(level: float, low: float, high: float) -> None:
    found = [mean_of_units(exponential(60, seed), level=level, resamples=200, seed=seed) for seed in range(200)]
    assert low <= covered(found, 1.0) <= high


@pytest.mark.parametrize("truth", [0.03, 0.5, 0.9])
def test_the_interval_of_a_share_covers_the_truth_at_its_nominal_rate(truth: float) -> None:
    draws = torch.rand(2000, 80, generator=torch.Generator().manual_seed(1)) < truth
    assert 0.92 <= covered([share(hits) for hits in draws], truth) <= 0.985


def test_the_interval_of_a_mean_has_the_width_of_its_standard_error() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double() * 3 + 5
    found = mean_of_units(values, resamples=4000)
    error = float(values.std(correction=0)) / 20
    assert found.value == pytest.approx(float(values.mean()), rel=1e-12)
    assert found.samples == 400
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert found.high - found.value == pytest.approx(1.96 * error, rel=0.15)


def test_the_corrected_estimate_and_its_interval_are_reflected_about_the_raw_value() -> None:
    values = exponential(40, 3)

    def statistic(i: torch.Tensor) -> float:
        return float(values[i].max())

    percentile, found = bootstrap(statistic, 40), bootstrap_corrected(statistic, 40)
    assert percentile.high == percentile.value == found.raw == found.corrected.low == float(values.max())
    assert found.corrected.high - found.raw == pytest.approx(percentile.value - percentile.low)
    draws = [float(values[torch.randint(40, (40,))].max()) for _ in range(4000)]
    assert found.corrected.value - found.raw == pytest.approx(found.raw - float(torch.tensor(draws).median()), abs=0.3)


SETS = {
    "normal": lambda x: x,
    "rounded": lambda x: x.round(),
    "one far away": lambda x: torch.cat([1000 * x[:1], x[1:]]),
    "all the same": lambda x: torch.full_like(x, 0.1),
    "all but one the same": lambda x: torch.cat([torch.zeros_like(x[1:]), torch.ones_like(x[:1])]),
    "long tail": lambda x: x.exp().exp(),
}


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("count", [2, 3, 5, 20, 60])
def test_every_interval_contains_its_estimate(count: int, kind: str) -> None:
    """Whatever the samples are: few, equal, far from each other."""
    for seed in range(2):
        first, second = (SETS[kind](randn(count, 3, seed=2 * seed + i).double()) for i in range(2))
        other = SETS["normal"](randn(7, 3, seed=50 + seed).double())
        groups = torch.arange(count) // 2 if count > 2 else torch.zeros(2)
        found = [
            mean_of_units(first[:, 0], resamples=100),
            share(first[:, 0] > 0),
            seed_diversity(first, groups, euclidean_distance),
            *(kernel_estimate(first, against, resamples=100) for against in (second, other)),
            *(frechet_estimate(first, against, resamples=20).corrected for against in (second, other, first)),
        ]
        if count % 5 == 0:
            found.append(frechet_estimate(first, other, (5 if count > 5 else 1, 1), resamples=20).corrected)
        if count > 5:
            measured = manifold(first, second)
            found += [measured.precision, measured.recall, measured.coverage]
        for estimate in found:
            assert estimate.low <= estimate.value <= estimate.high or math.isnan(estimate.low), estimate


def test_sets_are_resampled_independently() -> None:
    """The variance of a difference of two means is the sum: it would be 0 if both sets drew the same units."""
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).double()
    found = bootstrap(lambda i, j: float(values[i].mean() - values[j].mean()), 200, 200, resamples=2000)
    expected = 2 * 1.96 * float(values.std(correction=0)) * (2 / 200) ** 0.5
    assert found.value == 0
    assert found.high - found.low == pytest.approx(expected, rel=0.08)


def test_intervals_repeat_with_their_seed() -> None:
    values = exponential(30, 0)
    first, again, other = (mean_of_units(values, seed=seed, resamples=50) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first.value == other.value


def test_the_interval_of_a_share_is_wilsons() -> None:
    """10 of 50, from Wilson's formula by hand; and no interval of zero width at the ends."""
    found = share(torch.arange(50) < 10)
    assert (found.value, found.samples) == (0.2, 50)
    assert (found.low, found.high) == (pytest.approx(0.11244, abs=1e-4), pytest.approx(0.33037, abs=1e-4))
    none, everything = share(torch.zeros(50, dtype=torch.bool)), share(torch.ones(50, dtype=torch.bool))
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(0.0714, abs=1e-3)
    assert (everything.value, everything.high) == (1, pytest.approx(1))
    assert everything.low == pytest.approx(1 - none.high)


def test_one_unit_has_a_value_and_no_interval() -> None:
    found = mean_of_units(torch.tensor([2.5]))
    assert found.value == 2.5
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 2 units in every set, found \[5, 1\]"):
        bootstrap(lambda i, j: 0.0, 5, 1)
    with pytest.raises(ValueError, match="at least one unit, found none"):
        share(torch.zeros(0, dtype=torch.bool))

"""Frechet and kernel distance, precision and recall, on cases with a known answer."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pdmd_core.metrics import frechet_distance, frechet_estimate, kernel_distance, manifold, polynomial_discrepancy
from tests.helpers.tiny import randn


def normal(count: int, dimensions: int, seed: int) -> Tensor:
    return randn(count, dimensions, seed=seed).double()


# --- frechet_estimate: value and interval of the distance that tests/pdmd_core/metrics/test_frechet.py is about -------


def test_the_interval_covers_the_closed_form_distance_of_two_gaussians_at_its_nominal_rate() -> None:
    """Means (1, 0, 0), deviations 1 against 2: 1 + 3 * (2 - 1)^2 = 4."""
    shift = torch.tensor([1.0, 0.0, 0.0]).double()
    found = [
        frechet_estimate(normal(150, 3, 2 * seed), shift + 2 * normal(150, 3, 2 * seed + 1), resamples=60, seed=seed)
        for seed in range(60)
    ]
    corrected = [e.corrected for e in found]
    assert 0.86 <= sum(e.low <= 4 <= e.high for e in corrected) / len(found) <= 1.0
    assert sum(e.high - e.low for e in corrected) / len(found) < 2.5
    assert found[0].raw == frechet_distance(normal(150, 3, 0), shift + 2 * normal(150, 3, 1))
    assert corrected[0].samples == 150


def test_the_correction_takes_most_of_the_bias_of_few_samples_off() -> None:
    """Twelve standard normal dimensions: the distance of equal distributions is 0, of 40 samples never."""
    found = [
        frechet_estimate(normal(40, 12, 2 * seed), normal(40, 12, 2 * seed + 1), resamples=60, seed=seed)
        for seed in range(20)
    ]
    raw, corrected = (sum(x) / len(found) for x in ([e.raw for e in found], [e.corrected.value for e in found]))
    assert raw > 1.5 and corrected < 0.25 * raw


def test_the_interval_of_equal_distributions_reaches_zero_though_the_raw_value_cannot() -> None:
    found = frechet_estimate(normal(60, 8, 0), normal(60, 8, 1), resamples=100)
    assert found.raw > 0.3
    assert found.corrected.low == 0 <= found.corrected.value <= found.corrected.high < found.raw


def test_whole_seeds_are_resampled_where_prompts_differ_more_than_seeds() -> None:
    """Far-apart prompts: seed by seed the interval is that of the noise about them, one by one it is far below."""
    prompts = 10 * normal(20, 3, 5).repeat_interleave(8, 0)
    first, second = prompts + normal(160, 3, 6), prompts + 0.5 + normal(160, 3, 7)
    by_seed, one_by_one = (frechet_estimate(first, second, seeds, resamples=200) for seeds in ((8, 8), (1, 1)))
    assert by_seed.raw == one_by_one.raw == frechet_distance(first, second)
    by_seed, one_by_one = by_seed.corrected, one_by_one.corrected
    assert by_seed.low < 0.75 < by_seed.high, "the means are 0.5 apart in three dimensions"
    assert by_seed.high - by_seed.low < 1
    assert one_by_one.high < 0.75
    assert by_seed.samples == one_by_one.samples == 160
    mixed = frechet_estimate(first, second[:50], (8, 1), resamples=50)
    assert mixed.corrected.samples == 50


# --- kernel distance -----------------------------------------------------------------------------------------------


def test_the_discrepancy_is_the_unbiased_sum_over_pairs() -> None:
    first, second = normal(5, 3, 0), 2 * normal(4, 3, 1)

    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within = [
        sum(kernel(s[i], s[j]) for i, j in itertools.permutations(range(len(s)), 2)) / (len(s) * (len(s) - 1))
        for s in (first, second)
    ]
    between = sum(kernel(x, y) for x in first for y in second) / 20
    assert polynomial_discrepancy(first, second) == pytest.approx(sum(within) - 2 * between, rel=1e-12)


def test_the_discrepancy_of_point_masses_is_the_closed_form() -> None:
    """All samples at x and all at y, one dimension: k(x, x) + k(y, y) - 2 k(x, y)."""
    first, second = torch.full((6, 1), 2.0), torch.full((9, 1), -1.0)
    assert polynomial_discrepancy(first, second) == pytest.approx((4 + 1) ** 3 + (1 + 1) ** 3 - 2 * (-2 + 1) ** 3)


def test_the_discrepancy_of_a_shifted_gaussian_is_the_closed_form() -> None:
    """One dimension, N(0, 1) against N(m, 1): E (xy + 1)^3 in moments of both, by expansion."""

    def moments(mean: float) -> list[float]:
        return [1, mean, mean**2 + 1, mean**3 + 3 * mean]

    def expected(a: float, b: float) -> float:
        return sum(c * p * q for c, p, q in zip((1, 3, 3, 1), moments(a), moments(b), strict=True))

    truth = expected(0, 0) + expected(1, 1) - 2 * expected(0, 1)
    found = [polynomial_discrepancy(normal(700, 1, 2 * seed), 1 + normal(700, 1, 2 * seed + 1)) for seed in range(20)]
    assert sum(found) / 20 == pytest.approx(truth, rel=0.05)


def test_equal_distributions_have_discrepancy_zero_on_average_however_few_the_samples() -> None:
    values = torch.tensor([polynomial_discrepancy(normal(12, 4, 2 * s), normal(12, 4, 2 * s + 1)) for s in range(600)])
    error = float(values.std()) / 600**0.5
    assert abs(float(values.mean())) < 3 * error
    assert float((values < 0).double().mean()) > 0.4


def test_the_kernel_distance_is_the_mean_over_subsets_with_their_deviation() -> None:
    first, second = normal(300, 6, 0), 0.5 + normal(200, 6, 1)
    found = kernel_distance(first, second, subsets=80, subset_size=100)
    assert (found.subsets, found.subset_size) == (80, 100)
    assert found.value == pytest.approx(polynomial_discrepancy(first, second), abs=4 * found.deviation / 80**0.5)
    assert found.deviation > 0
    assert found == kernel_distance(first, second, subsets=80, subset_size=100)
    smaller = kernel_distance(first, second, subsets=80, subset_size=30)
    assert smaller.deviation > 1.5 * found.deviation
    assert kernel_distance(first, second, subsets=2).subset_size == 200


def test_a_kernel_distance_of_whole_sets_has_no_deviation() -> None:
    first, second = normal(40, 3, 0), normal(40, 3, 1)
    found = kernel_distance(first, second, subsets=3, subset_size=40)
    assert found.value == pytest.approx(polynomial_discrepancy(first, second))
    assert found.deviation == pytest.approx(0, abs=1e-9)


# --- precision, recall, density, coverage --------------------------------------------------------------------------


def test_identical_sets_hold_each_other_entirely() -> None:
    x = normal(100, 5, 0)
    found = manifold(x, x.clone(), neighbours=3)
    assert (found.precision.value, found.recall.value, found.coverage.value) == (1, 1, 1)
    # each of the 100 balls holds its centre and its 3 neighbours
    assert found.density == pytest.approx(4 / 3)


def test_disjoint_sets_hold_nothing() -> None:
    found = manifold(normal(100, 5, 0), 1000 + normal(100, 5, 1))
    assert (found.precision.value, found.recall.value, found.density, found.coverage.value) == (0, 0, 0, 0)
    assert found.recall.high > 0


def test_lost_modes_cost_recall_and_coverage_and_not_precision() -> None:
    reference = torch.cat([normal(150, 2, seed) + 100 * seed for seed in range(4)])
    half = torch.cat([normal(300, 2, 10 + seed) + 100 * seed for seed in range(2)])
    found = manifold(half, reference)
    assert found.precision.value > 0.9
    assert 0.4 < found.recall.value <= 0.5
    assert 0.4 < found.coverage.value <= 0.5
    strayed = manifold(reference, half)
    assert strayed.recall.value > 0.9
    assert strayed.precision.value <= 0.5


def test_a_small_case_by_hand() -> None:
    """One neighbour. Reference 0, 1, 10: radii 1, 1, 9. Samples 0.5, 12, 40: radii 11.5, 11.5, 28."""
    found = manifold(torch.tensor([[0.5], [12.0], [40.0]]), torch.tensor([[0.0], [1.0], [10.0]]), neighbours=1)
    # 0.5 is in the balls of 0 and 1; 12 in that of 10; 40 in none
    assert found.precision.value == pytest.approx(2 / 3)
    assert found.density == pytest.approx((2 + 1) / 3)
    assert found.coverage.value == 1
    # the balls of the samples: [-11, 12] holds 0, 1, 10
    assert found.recall.value == 1
    assert found.precision.samples == found.recall.samples == 3


def test_coverage_of_equal_distributions_is_its_closed_form() -> None:
    """1 - (N - 1) ... (N - k) / ((2N - 1) ... (2N - k)) for N of each (Naeem et al. 2020, lemma 2)."""
    count, k = 60, 3
    values = [
        manifold(normal(count, 2, 2 * s), normal(count, 2, 2 * s + 1), neighbours=k).coverage.value for s in range(150)
    ]
    expected = 1.0
    for i in range(1, k + 1):
        expected *= (count - i) / (2 * count - i)
    assert sum(values) / 150 == pytest.approx(1 - expected, abs=0.01)
    densities = [manifold(normal(count, 2, 2 * s), normal(count, 2, 2 * s + 1)).density for s in range(150)]
    assert sum(densities) / 150 == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("measure", [polynomial_discrepancy, kernel_distance, manifold, frechet_estimate])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(1, 3), "shape"),
        (torch.zeros(9), "shape"),
        (torch.full((9, 3), torch.nan), "not finite"),
        (torch.zeros(9, 4), "same dimensions"),
    ],
    ids=["one-sample", "vector", "nan", "other-dimensions"],
)
def test_features_that_cannot_be_compared_are_refused(measure, bad: Tensor, message: str) -> None:
    good = randn(9, 3)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match=f"{message}|at least 2 units"):
            measure(*pair)


def test_a_neighbourhood_needs_more_samples_than_neighbours() -> None:
    with pytest.raises(ValueError, match=r"samples >= 6, dimensions\), found \(5, 2\)"):
        manifold(randn(5, 2), randn(9, 2), neighbours=5)


def test_a_kernel_distance_needs_two_subsets_of_two() -> None:
    for sizes in ({"subsets": 1}, {"subset_size": 1}):
        with pytest.raises(ValueError, match="at least 2 subsets of 2 samples"):
            kernel_distance(randn(9, 3), randn(9, 3), **sizes)

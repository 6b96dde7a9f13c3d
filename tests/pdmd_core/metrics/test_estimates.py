"""Intervals of the kernel distance, and the Frechet distance of fewer samples than dimensions."""

from __future__ import annotations

import math

import pytest
import torch

from pdmd_core.metrics import clip_features, flow_statistics, frechet_distance, kernel_estimate, over_time
from pdmd_core.metrics.kernel import polynomial_discrepancy
from tests.helpers.tiny import randn


def test_the_value_is_the_discrepancy_and_lies_in_its_interval() -> None:
    first, second = randn(50, 3), randn(40, 3, seed=1) + 0.4
    found = kernel_estimate(first, second, resamples=200)
    assert found.value == polynomial_discrepancy(first, second)
    assert found.low < found.value < found.high and found.samples == 40
    assert found == kernel_estimate(first, second, resamples=200)


def test_the_interval_holds_the_true_distance_about_as_often_as_it_says() -> None:
    true = polynomial_discrepancy(randn(4000, 2), randn(4000, 2, seed=1) + 1)
    hits = 0
    for seed in range(100):
        found = kernel_estimate(randn(60, 2, seed=10 + seed), randn(60, 2, seed=500 + seed) + 1, 200, seed)
        hits += found.low <= true <= found.high
    assert 85 <= hits <= 99


def test_the_interval_narrows_with_samples_and_few_samples_have_one() -> None:
    widths = []
    for count in (3, 30, 300):
        found = kernel_estimate(randn(count, 2), randn(count, 2, seed=1), 300)
        assert math.isfinite(found.low) and math.isfinite(found.high)
        widths.append(found.high - found.low)
    assert widths[2] < 0.5 * widths[1] < widths[0]


@pytest.mark.parametrize("counts", [(6, 9), (9, 6), (6, 30), (20, 20)], ids=str)
def test_few_samples_in_many_dimensions_give_what_the_covariances_say(counts: tuple[int, int]) -> None:
    first, second = randn(counts[0], 12).double(), randn(counts[1], 12, seed=1).double() * 1.5 + 0.3
    one, two = torch.cov(first.T), torch.cov(second.T)
    cross = torch.linalg.eigvals(one @ two).real.clamp(min=0).sqrt().sum()
    expected = (first.mean(0) - second.mean(0)).square().sum() + one.trace() + two.trace() - 2 * cross
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-5)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-8)


def test_the_parts_of_clip_features_are_its_parts() -> None:
    frames, flow = randn(2, 4, 5), randn(2, 3, 2, 16, 16)
    joined = torch.cat([over_time(frames), flow_statistics(flow)], 1)
    assert torch.equal(joined, clip_features(frames, flow)) and joined.shape == (2, 10 + 24)
    assert over_time(torch.tensor([[[1.0], [3.0]]])).tolist() == [[2, 1]]

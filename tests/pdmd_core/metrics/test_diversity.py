from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pdmd_core.metrics import cosine_distance, euclidean_distance, pairwise_distance, prompt_agreement, seed_diversity
from tests.helpers.tiny import randn


def prompts(count: int, seeds: int) -> Tensor:
    return torch.arange(count).repeat_interleave(seeds)


@pytest.mark.parametrize("distance", [cosine_distance, euclidean_distance])
def test_identical_seeds_have_no_diversity(distance) -> None:
    features = (10 * randn(5, 40)).repeat_interleave(8, 0)
    found = seed_diversity(features, prompts(5, 8), distance)
    assert (found.value, found.low, found.high, found.samples) == (0, 0, 0, 5)


def test_orthogonal_opposite_and_scaled_features_have_cosine_distance_one_two_and_zero() -> None:
    x = torch.tensor([[3.0, 0.0], [1.0, 1.0], [2.0, 0.0], [0.0, 1.0]])
    y = torch.tensor([[0.0, 5.0], [-2.0, -2.0], [7.0, 0.0], [1.0, 1.0]])
    assert cosine_distance(x, y).tolist() == pytest.approx([1, 2, 0, 1 - 0.5**0.5])


def test_cosine_distance_is_one_minus_the_cosine_similarity() -> None:
    x, y = randn(50, 9), randn(50, 9, seed=1)
    torch.testing.assert_close(cosine_distance(x, y), 1 - F.cosine_similarity(x.double(), y.double()))


def test_random_directions_of_many_dimensions_are_at_distance_one() -> None:
    found = seed_diversity(randn(160, 500), prompts(20, 8), cosine_distance)
    assert found.value == pytest.approx(1, abs=0.01)  # cosines have deviation 500 ** -0.5
    assert 0.002 < found.high - found.low < 0.02


def test_diversity_does_not_depend_on_the_order_or_the_batch() -> None:
    features, groups, order = randn(30, 4), prompts(5, 6), torch.randperm(30)
    first = seed_diversity(features, groups, euclidean_distance)
    second = seed_diversity(features[order], groups[order], euclidean_distance, batch=7)
    assert first.value == pytest.approx(second.value, rel=1e-12)
    assert (first.low, first.high) == (pytest.approx(second.low), pytest.approx(second.high))
    assert first.value == pairwise_distance(features, groups)


def test_a_distance_of_pixels_gets_each_pair_of_a_prompt_once() -> None:
    pixels, seen = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 3, 2, 2), []

    def distance(first: Tensor, second: Tensor) -> Tensor:
        seen.extend(zip(first[:, 0, 0, 0].tolist(), second[:, 0, 0, 0].tolist(), strict=True))
        return (first - second).abs().mean((1, 2, 3), keepdim=True)  # the shape of the package lpips

    found = seed_diversity(pixels, torch.tensor([0, 1, 0, 1, 0]), distance, batch=2)
    assert sorted(seen) == [(0, 2), (0, 4), (1, 3), (2, 4)]
    assert found.value == (2 + 4 + 2 + 2) / 4


def test_the_interval_is_over_prompts_and_covers_the_truth_at_its_nominal_rate() -> None:
    """A pair of seeds at N(m_p, 1): prompts differ in how far apart their seeds are, with mean 3."""
    hits = 0
    for seed in range(120):
        gaps = 3 + randn(40, seed=seed)
        features = torch.stack([torch.zeros(40), gaps], 1).reshape(80, 1)
        found = seed_diversity(features, prompts(40, 2), lambda x, y: (y - x)[:, 0])
        hits += found.low <= 3 <= found.high
        assert found.samples == 40
    assert 0.88 <= hits / 120 <= 0.99


def test_prompts_with_more_seeds_weigh_as_many_pairs() -> None:
    """Pairs at distance 1 everywhere: no resampling of prompts of 2, 3 and 5 seeds changes that."""
    groups = torch.tensor([0] * 2 + [1] * 3 + [2] * 5)
    found = seed_diversity(torch.eye(10), groups, cosine_distance)
    assert (found.value, found.low, found.high) == (pytest.approx(1), pytest.approx(1), pytest.approx(1))


def test_one_prompt_has_no_interval() -> None:
    found = seed_diversity(randn(6, 3), torch.zeros(6), cosine_distance)
    assert found.value > 0
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_diversity_needs_two_seeds_and_a_group_for_each_sample() -> None:
    with pytest.raises(ValueError, match="at least two samples of one prompt"):
        seed_diversity(randn(3, 2), torch.arange(3), cosine_distance)
    with pytest.raises(ValueError, match="one group each, found"):
        seed_diversity(randn(3, 2), torch.arange(4), cosine_distance)


# --- prompt agreement ----------------------------------------------------------------------------------------------


def test_agreement_counts_samples_that_show_everything_the_prompt_named() -> None:
    wanted = torch.tensor([[0, 1], [0, 1], [2, -1], [2, -1], [-1, -1]])
    seen = torch.tensor([[0, 1], [0, 3], [2, 7], [1, 0], [5, 5]])
    found = prompt_agreement(seen, wanted)
    assert (found.value, found.samples) == (0.5, 4)
    assert found.low < 0.5 < found.high


def test_agreement_with_one_class_a_sample() -> None:
    assert prompt_agreement(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 0])).value == pytest.approx(2 / 3)
    assert prompt_agreement(torch.arange(9), torch.arange(9)).value == 1


def test_agreement_refuses_other_shapes_and_prompts_that_say_nothing() -> None:
    with pytest.raises(ValueError, match=r"found \(3,\) seen and \(4,\) wanted"):
        prompt_agreement(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="nothing to agree with"):
        prompt_agreement(torch.zeros(3), -torch.ones(3))

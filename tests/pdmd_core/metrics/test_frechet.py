from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pdmd_core.metrics import frechet_distance, pairwise_distance
from tests.helpers.tiny import randn


def gaussian(count: int, mean: Tensor, root: Tensor, seed: int) -> Tensor:
    """Samples whose covariance is root @ root.T in expectation."""
    return mean + randn(count, len(mean), seed=seed).double() @ root.T


def whitened(count: int, dimensions: int, seed: int = 0) -> Tensor:
    """Features whose sample mean is exactly 0 and sample covariance exactly 1."""
    x = randn(count, dimensions, seed=seed).double()
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


# --- frechet_distance -------------------------------------------------------


@pytest.mark.parametrize("shape", [(50, 3), (1000, 16), (10, 40), (2, 5), (30, 1)])
def test_the_distance_of_equal_sets_is_zero(shape: tuple[int, int]) -> None:
    x = 5 + 3 * randn(*shape)
    scale = float(x.double().var(0).sum())
    assert 0 <= frechet_distance(x, x.clone()) <= 1e-8 * scale
    assert 0 <= frechet_distance(x, x.flip(0)) <= 1e-8 * scale


def test_a_shift_alone_counts_its_squared_length() -> None:
    x = randn(200, 6).double() @ randn(6, 6, seed=1).double()
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, 0.0], dtype=torch.float64)
    assert frechet_distance(x, x + shift) == pytest.approx(float(shift.square().sum()), rel=1e-9)


def test_a_change_of_scale_alone_counts_the_difference_of_standard_deviations() -> None:
    x = whitened(300, 5)
    scale = torch.tensor([2.0, 0.5, 1.0, 3.0, 0.0], dtype=torch.float64)
    assert frechet_distance(x, x * scale) == pytest.approx(float((scale - 1).square().sum()), rel=1e-6)


def test_the_covariances_need_not_commute() -> None:
    """C_1 = diag(4, 1), C_2 = the same turned by 45 degrees: tr((C_1 C_2)^(1/2)) = sqrt(tr + 2 sqrt(det))."""
    x = whitened(400, 2)
    stretch = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / 2**0.5
    first, second = x @ stretch, x @ stretch @ turn.T
    c1, c2 = stretch @ stretch, turn @ stretch @ stretch @ turn.T
    cross = float((torch.trace(c1 @ c2) + 2 * torch.linalg.det(c1 @ c2).sqrt()).sqrt())
    assert frechet_distance(first, second) == pytest.approx(5 + 5 - 2 * cross, rel=1e-9)
    assert 10 - 2 * cross > 0.5


def test_two_gaussians_are_as_far_apart_as_the_closed_form_says() -> None:
    means = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, -0.5]], dtype=torch.float64)
    roots = [torch.eye(3).double(), torch.tensor([[1.5, 0.0, 0.0], [0.7, 1.0, 0.0], [0.0, 0.3, 0.5]]).double()]
    # for C_1 = 1 the cross term is tr(C_2^(1/2)), the sum of the singular values of its root
    second = roots[1] @ roots[1].T
    closed = 1.25 + 3 + float(second.trace()) - 2 * float(torch.linalg.svdvals(roots[1]).sum())
    found = frechet_distance(*(gaussian(200_000, means[k], roots[k], seed=k) for k in range(2)))
    assert found == pytest.approx(closed, rel=0.02)


def test_the_distance_is_symmetric() -> None:
    first, second = randn(60, 8), 2 * randn(90, 8, seed=1) @ randn(8, 8, seed=2)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-9)
    assert frechet_distance(first, second) > 1


def test_fewer_samples_than_dimensions_and_constant_features_stay_finite() -> None:
    first, second = randn(5, 30), torch.ones(4, 30)
    expected = (first.double().mean(0) - 1).square().sum() + first.double().var(0).sum()
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("which", ["first", "second"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(1, 3), r"shape \(samples >= 2, dimensions\), found \(1, 3\)"),
        (torch.zeros(8), r"found \(8,\)"),
        (torch.zeros(4, 3, 2), r"found \(4, 3, 2\)"),
        (torch.full((4, 3), torch.nan), "not finite"),
        (torch.full((4, 3), torch.inf), "not finite"),
        (torch.zeros(4, 5), "dimensions"),
    ],
    ids=["one-sample", "vector", "three-dimensional", "nan", "infinite", "other-dimensions"],
)
def test_features_that_cannot_be_compared_are_refused(which: str, bad: Tensor, message: str) -> None:
    good = randn(4, 3)
    with pytest.raises(ValueError, match=message):
        frechet_distance(*((bad, good) if which == "first" else (good, bad)))


# --- pairwise_distance ------------------------------------------------------


@pytest.mark.parametrize("count", [2, 8, 26, 60])
def test_seeds_that_all_agree_have_no_diversity(count: int) -> None:
    features = (100 * randn(3, 50)).repeat_interleave(count, 0)
    assert pairwise_distance(features, torch.arange(3).repeat_interleave(count)) == 0


def test_diversity_is_the_mean_over_all_pairs_of_a_prompt() -> None:
    """A right triangle with sides 3, 4, 5 and a pair at distance 10: (3 + 4 + 5 + 10) / 4."""
    features = torch.tensor([[0.0, 0], [3, 0], [0, 4], [100, 100], [106, 108]])
    assert pairwise_distance(features, torch.tensor([0, 0, 0, 1, 1])) == pytest.approx(5.5, rel=1e-12)


def test_only_pairs_of_the_same_prompt_count_in_any_order() -> None:
    features = torch.tensor([[0.0], [1000.0], [1.0], [1003.0]])
    assert pairwise_distance(features, torch.tensor([7, 2, 7, 2])) == pytest.approx(2.0, rel=1e-12)
    assert pairwise_distance(features, torch.tensor([7, 2, 7, 5])) == pytest.approx(1.0, rel=1e-12)


def test_diversity_equals_a_loop_over_pairs_for_many_samples() -> None:
    features, groups = randn(60, 7), torch.arange(60) % 4
    pairs = [
        float((features[i].double() - features[j].double()).norm())
        for i, j in itertools.combinations(range(60), 2)
        if groups[i] == groups[j]
    ]
    assert pairwise_distance(features, groups) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)


def test_diversity_needs_two_seeds_of_one_prompt() -> None:
    with pytest.raises(ValueError, match="at least two samples of one prompt"):
        pairwise_distance(randn(3, 4), torch.arange(3))
    with pytest.raises(ValueError, match="at least two samples of one prompt"):
        pairwise_distance(torch.zeros(0, 4), torch.arange(0))


@pytest.mark.parametrize(
    ("features", "groups"),
    [(torch.zeros(4), torch.zeros(4)), (torch.zeros(4, 2), torch.zeros(3)), (torch.zeros(4, 2), torch.zeros(4, 2))],
)
def test_features_and_groups_of_other_shapes_are_refused(features: Tensor, groups: Tensor) -> None:
    with pytest.raises(ValueError, match="one group each, found"):
        pairwise_distance(features, groups)

"""Runs that are trained at once are the runs that are trained alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.claims.common.distilling import distil
from benchmarks.claims.common.methods import METHODS, Run
from benchmarks.claims.common.variants import BASELINE, VARIANTS
from benchmarks.claims.mixture.board import MixtureBoard
from benchmarks.claims.mixture.kinds import KINDS
from benchmarks.claims.mixture.many import StackedNetworks, distil_many
from benchmarks.claims.mixture.mixture import GaussianMixture, VelocityNetwork, kernel_distance_to_exact
from benchmarks.claims.mixture.training import MixtureProblem, Settings, fit_initial_network
from pdmd_core.rollout import sample

SMALL = Settings(batch_size=64, width=16, fake_updates=2, initial_updates=50, ema_decay=0.9)
MIXTURE = GaussianMixture.ring()


def test_stacked_networks_are_the_networks_of_their_rows() -> None:
    torch.manual_seed(0)
    stacked = StackedNetworks(VelocityNetwork(16), 3)
    with torch.no_grad():
        for parameter in stacked.parameters():
            parameter.add_(torch.randn_like(parameter))
    x, sigma = torch.randn(12, 2), torch.rand(12)
    expected = []
    for i, state in enumerate(stacked.states()):
        network = VelocityNetwork(16)
        network.load_state_dict(state)
        expected.append(network(x[4 * i : 4 * i + 4], sigma[4 * i : 4 * i + 4]))
    torch.testing.assert_close(stacked(x, sigma), torch.cat(expected))


@pytest.mark.parametrize("key", ["2x2_step", "phased_4x1", "2x2_own", "2x2_path"])
def test_each_run_is_the_one_that_is_trained_alone(key: str) -> None:
    """At its own learning rate, with its own clipping and average."""
    initial, method = fit_initial_network(MIXTURE, SMALL), VARIANTS[key]
    runs = [Run(method, lr, 7, 24) for lr in (1e-3, 1e-2)]
    for run, found in zip(runs, distil_many(runs, MIXTURE, initial, SMALL), strict=True):
        alone = distil(MixtureProblem(method, MIXTURE, initial, SMALL), run, SMALL.recipe())
        assert found.evaluations == alone.evaluations
        for name, state in alone.experts.items():
            for part, value in state.items():
                torch.testing.assert_close(found.experts[name][part], value, rtol=2e-3, atol=2e-4)
                assert not torch.equal(value, initial.state_dict()[part])


def test_seeds_have_draws_of_their_own_and_a_run_that_diverges_harms_no_other() -> None:
    initial, method = fit_initial_network(MIXTURE, SMALL), METHODS["phased_4x1"]
    runs = [Run(method, lr, seed, 8) for lr in (1e-3, 1e30) for seed in (0, 1)]
    found = distil_many(runs, MIXTURE, initial, SMALL)
    alone = distil(MixtureProblem(method, MIXTURE, initial, SMALL), runs[1], SMALL.recipe())
    for name, state in alone.experts.items():
        for part, value in state.items():
            torch.testing.assert_close(found[1].experts[name][part], value, rtol=2e-3, atol=2e-4)
            assert not torch.equal(value, found[0].experts[name][part])


def test_runs_of_two_methods_are_not_trained_at_once() -> None:
    runs = [Run(METHODS[key], 1e-3, 0, 8) for key in ("phased_4x1", "phased_2x2")]
    with pytest.raises(ValueError, match="learning rate and seed alone"):
        distil_many(runs, MIXTURE, VelocityNetwork(16), SMALL)


@pytest.mark.parametrize("kind", list(KINDS))
def test_exact_samples_and_many_steps_of_the_teacher_are_at_the_floor_on_every_mixture(kind: str) -> None:
    mixture = KINDS[kind].mixture
    assert float(mixture.weights.sum()) == pytest.approx(1)
    exact = mixture.sample(3000, torch.Generator().manual_seed(1))
    assert abs(kernel_distance_to_exact(exact, mixture)) < 5e-4
    noise = torch.randn(3000, mixture.dimensions, generator=torch.Generator().manual_seed(2))
    walked = sample(mixture.velocity, [1 - i / 100 for i in range(100)], noise)
    assert kernel_distance_to_exact(walked, mixture) < 2e-3
    assert kernel_distance_to_exact(exact * 1.2, mixture) > 4e-3


@pytest.mark.parametrize("key", list(VARIANTS))
def test_every_variant_costs_what_the_baseline_does(key: str, tmp_path: Path) -> None:
    board, method = MixtureBoard(tmp_path, "ring"), VARIANTS[key]
    forward, backward = board.cost(method)
    assert (board.cost(VARIANTS[BASELINE]), board.updates(VARIANTS[BASELINE])) == ((22.0, 6.0), 1200)
    assert board.updates(method) * (forward + 2 * backward) == pytest.approx(1200 * (22 + 2 * 6), rel=0.01)
    assert board.updates(method) % len(method.steps) == 0

"""RunRNG: the same samples however many processes share them, and exact resumption."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pdmd_core.distillation import PhasedDistiller
from pdmd_core.method import Objective
from pdmd_core.phases import PhasePlan
from training.data.order import ExampleOrder
from training.loop.rng import RunRNG

DISTILLER = PhasedDistiller(PhasePlan.from_steps([2, 2], 5.0), 0, None, Objective())  # type: ignore[arg-type]


def draws_of(seed: int, batch: int, rank: int = 0, processes: int = 1) -> RunRNG:
    return RunRNG(seed, batch, ExampleOrder([torch.arange(100)], [1.0], seed), rank, processes)


def drawn(draws: RunRNG) -> list[Tensor]:
    first = [draws.examples()[1], draws.noise((3, 2)), draws.score_sigmas(DISTILLER)]
    return [*first, draws.examples()[1], draws.noise((3, 2)), draws.score_sigmas(DISTILLER)]


def test_processes_take_their_rows_of_one_batch() -> None:
    whole = drawn(draws_of(seed=3, batch=6))
    parts = [drawn(draws_of(seed=3, batch=6, rank=rank, processes=3)) for rank in range(3)]
    for all_rows, *rows in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(rows), all_rows)
        assert len({row.numpy().tobytes() for row in rows}) == 3, "every process has samples of its own"


def test_a_state_continues_where_it_was_taken() -> None:
    draws = draws_of(seed=0, batch=4)
    drawn(draws)
    state = {name: value.clone() for name, value in draws.state_dict().items()}
    expected = [*drawn(draws), torch.rand(3, generator=draws.shared)]
    other = RunRNG(9, 4, ExampleOrder([torch.arange(100)], [1.0], 0))
    other.load_state_dict(state)
    found = [*drawn(other), torch.rand(3, generator=other.shared)]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_seeds_differ() -> None:
    first, second = drawn(draws_of(0, 4)), drawn(draws_of(1, 4))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_group_is_compared_on_one_network_and_every_process_has_as_many_of_it() -> None:
    boundary, rng = 0.9, draws_of(seed=1, batch=12)
    draws = [rng.score_sigmas(DISTILLER, boundary, groups=3) for _ in range(400)]
    sides = torch.stack([(t >= boundary).reshape(4, 3) for t in draws])
    assert bool((sides == sides[:, :1]).all()), "samples i, i + 3, ... are on one side"
    assert 0 < sides.float().mean() < 1
    for rank in range(4):
        part = draws_of(seed=1, batch=12, rank=rank, processes=4)
        for whole in draws:
            assert torch.equal(part.score_sigmas(DISTILLER, boundary, groups=3), whole[3 * rank : 3 * rank + 3])


@pytest.mark.parametrize("groups", [1, 4])
def test_groups_leave_each_sigma_the_distribution_that_it_has_without(groups: int) -> None:
    rng, boundary = draws_of(seed=5, batch=4), 0.9
    grouped = torch.stack([rng.score_sigmas(DISTILLER, boundary, groups) for _ in range(4000)]).double()
    alone = torch.cat([rng.score_sigmas(DISTILLER) for _ in range(4000)]).double()
    at = torch.linspace(0, 1, 21, dtype=torch.float64).mul(0.98).add(0.01)
    for sample in range(4):
        error = (grouped[:, sample].quantile(at) - alone.quantile(at)).abs().max()
        assert error < 0.02, (sample, error)


def test_what_rounds_to_the_boundary_stays_on_its_side(monkeypatch: pytest.MonkeyPatch) -> None:
    boundary = 0.9  # no number of float32
    for side, share in ((0.0, 1.0), (0.999, 0.0)):  # the end of the lower side, the start of the upper one
        values = iter(torch.tensor([share, share, side], dtype=torch.float64))
        with monkeypatch.context() as patched:
            patched.setattr(torch, "rand", lambda *_, **__: next(values))  # noqa: B023
            sigmas = draws_of(seed=0, batch=2).score_sigmas(DISTILLER, boundary)
        above = side > 0.5
        assert [bool(sigma >= boundary) for sigma in sigmas] == [above, above]
        assert [float(sigma) >= boundary for sigma in sigmas] == [above, above]


def test_a_process_draws_its_own_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_shapes, original = list[tuple[int, ...]](), torch.randn

    def counted(shape: tuple[int, ...], **settings: Any) -> Tensor:
        drawn_shapes.append(tuple(shape))
        return original(shape, **settings)

    monkeypatch.setattr(torch, "randn", counted)
    draws_of(seed=0, batch=64, rank=3, processes=32).noise((3, 2))
    assert drawn_shapes == [(3, 2)] * 2


def test_noise_is_normal_and_no_two_draws_of_it_are_related() -> None:
    rng = draws_of(seed=0, batch=4)
    noise = torch.stack([rng.noise((5000,)) for _ in range(3)]).flatten(0, 1)
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02
    assert (torch.corrcoef(noise) - torch.eye(12)).abs().max() < 0.06

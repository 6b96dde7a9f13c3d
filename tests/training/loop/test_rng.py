"""RunRNG: the same samples however many processes share them, and exact resumption."""

from __future__ import annotations

import torch
from torch import Tensor

from pdmd_core.distillation import Objective, PhasedDistiller
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

"""The order of examples: complete, random, and the same on any number of processes."""

from __future__ import annotations

import pytest
import torch

from training.data.order import ExampleOrder


def order(seed: int = 0) -> ExampleOrder:
    return ExampleOrder([torch.arange(10), torch.arange(10, 14)], [3.0, 1.0], seed)


def drawn(source: ExampleOrder, batches: int, parts: int = 1) -> list[tuple[int, list[int]]]:
    """Batches of 4, put together from what each of so many processes draws."""
    state, found = source.state(), []
    for part in range(parts):
        source.load_state(state)
        found.append([source.draw(4, part, parts) for _ in range(batches)])
    whole = []
    for of_parts in zip(*found, strict=True):
        assert len({bucket for bucket, _ in of_parts}) == 1
        whole.append((of_parts[0][0], torch.cat([indices for _, indices in of_parts]).tolist()))
    return whole


@pytest.mark.parametrize("parts", [2, 4])
def test_processes_together_draw_what_one_draws(parts: int) -> None:
    assert drawn(order(), 30, parts) == drawn(order(), 30)


def test_every_example_comes_once_each_time_round_in_another_order() -> None:
    source = ExampleOrder([torch.arange(10)], [1.0], 0)
    values = [i for _ in range(30) for i in source.draw(3)[1].tolist()]
    rounds = [values[i : i + 10] for i in range(0, 90, 10)]
    assert all(sorted(one) == list(range(10)) for one in rounds)
    assert len({tuple(one) for one in rounds}) == len(rounds)


def test_a_batch_is_of_one_bucket_drawn_by_its_share() -> None:
    batches = drawn(order(), 400)
    for bucket, indices in batches:
        assert all((index >= 10) == bool(bucket) for index in indices)
    assert 60 < sum(bucket for bucket, _ in batches) < 140, "a quarter of 400"


def test_resumed_on_another_number_of_processes_it_goes_on() -> None:
    whole = drawn(order(), 12)
    first = order()
    assert drawn(first, 5, 2) == whole[:5]
    second = order()
    second.load_state(first.state())
    assert drawn(second, 7, 4) == whole[5:]


def test_another_seed_is_another_order() -> None:
    assert drawn(order(1), 12) != drawn(order(2), 12)


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="3 equal parts"):
        order().draw(4, 0, 3)

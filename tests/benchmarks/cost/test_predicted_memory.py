"""Memory is what the dry run says, with the ways of saving it that change most; the others are in the benchmark's table."""

from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState

from benchmarks.cost.predicted_memory import TARGET, activation_rows, static_rows, table


@pytest.mark.parametrize("way", ["8 of 10 blocks swapped", "the base in int8", "one of two networks at a time"])
def test_static_memory_and_optimizers_are_as_predicted(way: str) -> None:
    AcceleratorState._reset_state()
    for row in static_rows(way, "10M"):
        assert row["predicted"] == pytest.approx(row["measured"], rel=TARGET), row
    assert table([row]).splitlines()[-1].startswith(f"| optimizer | {way} | ")


def test_inputs_of_blocks_in_host_memory_take_nothing_on_the_device() -> None:
    here, away = (activation_rows(way, "10M")[0] for way in ("blocks recomputed", "and their inputs in host memory"))
    for row in (here, away):
        assert row["predicted"] == pytest.approx(row["measured"], rel=TARGET), row
    assert away["measured"] < 0.95 * here["measured"]

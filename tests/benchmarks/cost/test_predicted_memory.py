"""Memory is what the dry run says, with two ways of saving it; the others are in the table of the benchmark."""

from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState

from benchmarks.cost.predicted_memory import TARGET, activation_rows, static_rows, table


def test_memory_is_as_predicted() -> None:
    AcceleratorState._reset_state()
    rows = static_rows("8 of 10 blocks swapped", "10M") + activation_rows("and their inputs in host memory", "10M")
    assert [row["what"] for row in rows] == ["static", "optimizer", "activations"]
    for row in rows:
        assert row["predicted"] == pytest.approx(row["measured"], rel=TARGET), row
    assert table(rows[1:2]).splitlines()[-1].startswith("| optimizer | 8 of 10 blocks swapped | ")

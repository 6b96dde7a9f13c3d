"""Where a run is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """``update`` generator updates of ``phase`` are done, ``total`` in all phases."""

    phase: int = 0
    update: int = 0
    total: int = 0
    bad_in_a_row: int = 0
    bad: int = 0

    def count(self, good: bool) -> None:
        """One more update; a bad one had NaN or Inf in a loss or a gradient."""
        self.bad_in_a_row = 0 if good else self.bad_in_a_row + 1
        self.bad += not good
        self.update += 1
        self.total += 1

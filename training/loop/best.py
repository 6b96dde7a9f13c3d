"""Which checkpoints are the best, and whether a run still gets better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from training.config.sections import CheckpointsSection


class StoppedEarly(Exception):
    """A run that ended because it does not get better, or is broken. One line.

    Attributes:
        exit_status: Unlike that of a run that ended otherwise.
    """

    exit_status = 3


class BestCheckpoints:
    """The update of each phase whose validation had the least of a measure; less is better in all of them.

    Args:
        section: Which measure counts.
        seen: Validations of the run so far, as they were logged.
    """

    def __init__(self, section: CheckpointsSection, seen: Iterable[Mapping[str, Any]] = ()) -> None:
        self.measure, self.patience = section.best, section.patience
        self._best: dict[str, tuple[float, int]] = {}
        self._waited: dict[str, int] = {}
        for line in seen:
            self.after_validation(line["expert"], line["update"], line)

    def after_validation(self, expert: str, update: int, measures: Mapping[str, Any]) -> None:
        """Take note of a validation.

        Args:
            expert: The expert in training.
            update: Updates done so far; what was sampled before the first has no checkpoint.
            measures: Its numbers by name.
        """
        value = measures.get(self.measure) if self.measure else None
        if not update or value is None or update == self.update_of(expert):
            return
        if math.isfinite(value) and value < self._best.get(expert, (math.inf, 0))[0]:
            self._best[expert], self._waited[expert] = (value, update), 0
        else:
            self._waited[expert] = self._waited.get(expert, 0) + 1

    def update_of(self, expert: str) -> int | None:
        """After which update the expert was best; None where nothing was measured."""
        return self._best[expert][1] if expert in self._best else None

    @property
    def updates(self) -> set[int]:
        """The updates whose checkpoints stay."""
        return {update for _, update in self._best.values()}

    def reason_to_stop(self, expert: str) -> str | None:
        """Why the run should stop, in a line; None while it gets better."""
        if self.patience is None or self._waited.get(expert, 0) < self.patience or expert not in self._best:
            return None
        value, update = self._best[expert]
        return (
            f"stopped: {self.measure} of {expert} was {value:.4g} after update {update} and not better in the "
            f"{self.patience} validations since; --export {update} makes the experts of that checkpoint, --resume "
            f"--from-checkpoint {update} goes on from it"
        )

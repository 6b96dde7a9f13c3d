"""Variants at equal network evaluations on one teacher: chosen on seeds that are not reported, reported on others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.claims.common.evidence import Row, best_lr
from benchmarks.claims.common.methods import Method, Run
from benchmarks.claims.common.variants import BASELINE, VARIANTS, equal_updates

REPORTED = (0, 1, 2, 3, 4)
"""Seeds of the rows that are reported."""
REFINED = (4, 6, 8, 16)
"""Steps to which plans of fewer are refined."""
SHARES = (1 / 6, 1 / 3, 2 / 3, 1.0)
"""Of the baseline's network evaluations, in trainings that are as long as that."""


class Board(ABC):
    """Which runs are made, and which of them are reported."""

    title: str
    reference_titles: Mapping[str, str]
    """Of what needs no training."""
    recommended: str
    """The variant that the report names and judges; chosen by what is known of all teachers of this kind."""
    shift: float
    """Of the plans, but for methods that have one of their own."""
    baseline_updates: int
    """Updates of the baseline; other methods have as many network evaluations."""
    lrs: tuple[float, ...]
    """Learning rates: the middle three are tried first, then the next beyond the best until that is not at an end."""
    selecting: tuple[int, ...]
    """Seeds that decide on the learning rate."""
    published: Sequence[Row] = ()
    """Reported rows that are kept where this machine has none, with their learning rates."""

    @abstractmethod
    def cost(self, method: Method) -> tuple[float, float]:
        """Network evaluations of an update: forward, and those that run backward."""

    @abstractmethod
    def row(self, run: Run) -> Row | None:
        """What was measured of a run; None before."""

    @abstractmethod
    def measure(self, runs: Sequence[Run]) -> Iterator[Row]:
        """Train and measure runs of one method that differ in learning rate and seed alone."""

    @abstractmethod
    def references(self) -> list[Row]:
        """Rows of what needs no training."""

    @abstractmethod
    def refined(self, run: Run, steps: int) -> float | None:
        """The score of samples of the same experts in more steps; None before that was measured."""

    @abstractmethod
    def refine(self, run: Run) -> None:
        """Measure those of a run that was trained."""

    def updates(self, method: Method, share: float = 1.0) -> int:
        """Updates of a method, over all phases, that cost this share of what those of the baseline do."""
        (forward, backward), (all_forward, all_backward) = self.cost(method), self.cost(VARIANTS[BASELINE])
        own, whole = forward + 2 * backward, all_forward + 2 * all_backward
        return equal_updates(method, own, share * whole, self.baseline_updates)

    def runs(self, method: Method, lrs: Sequence[float], seeds: Sequence[int], share: float = 1.0) -> list[Run]:
        """Of a method, at these learning rates with these seeds, at a share of the baseline's evaluations."""
        updates = self.updates(method, share)
        return [Run(method, lr, seed, updates) for seed in seeds for lr in lrs]

    def chosen(self, method: Method) -> float | None:
        """The learning rate that was best on the seeds that decide, here or where rows were published; or None."""
        lr, undecided = self._best(method)
        if not undecided:
            return lr
        rates = {row.lr for row in self._published(method, self.updates(method))}
        return rates.pop() if len(rates) == 1 else None

    def reported(self, method: Method, share: float = 1.0) -> list[Row]:
        """The rows of a method that are there, of the seeds that did not decide."""
        lr = self.chosen(method)
        if lr is None:
            return []
        published = {row.seed: row for row in self._published(method, self.updates(method, share)) if row.lr == lr}
        rows = [self.row(run) or published.get(run.seed) for run in self.runs(method, [lr], REPORTED, share)]
        return [row for row in rows if row is not None]

    def _published(self, method: Method, updates: int) -> list[Row]:
        return [row for row in self.published if (row.method, row.updates) == (method.key, updates)]

    def work(
        self, methods: Sequence[Method], seeds: Sequence[int] = REPORTED, shares: Sequence[float] = (1.0,)
    ) -> Iterator[Row]:
        """Train and measure what is not there yet, method by method; what is reported, of these seeds.

        With ``shares``, trainings of these shares of the baseline's evaluations, at the learning rate of whole ones.
        """
        for method in methods:
            while (lr := self.chosen(method)) is None:
                yield from self._missing(self.runs(method, self._best(method)[1], self.selecting))
            for share in shares:
                yield from self._missing(self.runs(method, [lr], seeds, share))

    def _missing(self, runs: Sequence[Run]) -> Iterator[Row]:
        if missing := [run for run in runs if self.row(run) is None]:
            yield from self.measure(missing)

    def _best(self, method: Method) -> tuple[float | None, list[float]]:
        """The best learning rate so far, and those that must be tried yet."""
        found = [row for row in map(self.row, self.runs(method, self.lrs, self.selecting)) if row is not None]
        tried = {lr for lr in self.lrs if sum(row.lr == lr for row in found) == len(self.selecting)}
        middle = len(self.lrs) // 2
        lr = best_lr([row for row in found if row.lr in tried], method.key, self.updates(method))
        place = middle if lr is None else self.lrs.index(lr)
        wanted = {*self.lrs[middle - 1 : middle + 2], *self.lrs[max(place - 1, 0) : place + 2]}
        return lr, [lr for lr in self.lrs if lr in wanted - tried]

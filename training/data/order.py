"""Which examples a batch holds: decided by the seed and by what was drawn before, never by the number of processes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor


class ExampleOrder:
    """Batches of one bucket each. Every bucket goes through its examples in a new random order each time round.

    members: indices of the examples of each bucket. shares: how often each bucket is drawn, relative to the others.
    """

    def __init__(self, members: Sequence[Tensor], shares: Sequence[float], seed: int) -> None:
        self.members, self.shares, self.seed = list(members), list(shares), seed
        self.batches = 0
        self.positions = [0] * len(self.members)
        self._orders: dict[int, tuple[int, Tensor]] = {}

    def draw(self, count: int, part: int = 0, parts: int = 1) -> tuple[int, Tensor]:
        """The next batch of ``count`` examples: its bucket, and the indices of one of ``parts`` equal parts of it.

        Every process draws with the same count and takes its own part; together they hold what one process would.
        """
        if count % parts:
            raise ValueError(f"a batch of {count} is not {parts} equal parts")
        (bucket,) = random.Random(f"{self.seed} bucket {self.batches}").choices(range(len(self.shares)), self.shares)
        first = self.positions[bucket] + part * (count // parts)
        indices = torch.stack([self._at(bucket, place) for place in range(first, first + count // parts)])
        self.batches += 1
        self.positions[bucket] += count
        return bucket, indices

    def _at(self, bucket: int, place: int) -> Tensor:
        members = self.members[bucket]
        round_, offset = divmod(place, len(members))
        if self._orders.get(bucket, (-1,))[0] != round_:
            seed = random.Random(f"{self.seed} round {round_} of {bucket}").getrandbits(63)
            order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))
            self._orders[bucket] = round_, order
        return members[self._orders[bucket][1][offset]]

    def state(self) -> Tensor:
        """What the next batch depends on; the same on every process."""
        return torch.tensor([self.batches, *self.positions])

    def load_state(self, state: Tensor) -> None:
        """Go on from here, on any number of processes."""
        self.batches, *self.positions = state.tolist()

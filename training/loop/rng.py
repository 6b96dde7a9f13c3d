"""Everything that is random in a run once its weights exist."""

from __future__ import annotations

import torch
from torch import Tensor

from pdmd_core.distillation import PhasedDistiller
from training.data.order import ExampleOrder


class RunRNG:
    """Examples, noise and sigmas of the updates.

    Every process draws the samples of all processes and takes its own rows of them: how many processes share a batch
    changes none of its samples. All processes stay in the same state, so one state is enough for a checkpoint.
    """

    def __init__(self, seed: int, batch: int, order: ExampleOrder, rank: int = 0, processes: int = 1) -> None:
        self.shared = torch.Generator().manual_seed(seed)
        """What is one for a whole batch: the step that trains, fresh weights of a role."""
        self.samples = torch.Generator().manual_seed(seed + 1000)
        """What each sample has of its own."""
        self.order, self.rank, self.processes = order, rank, processes
        self.total = batch
        own = batch // processes
        self.own = slice(rank * own, (rank + 1) * own)

    def examples(self) -> tuple[int, Tensor]:
        """The bucket of the next batch, and which of its examples are this process's, shape (batch,)."""
        return self.order.draw(self.total, self.rank, self.processes)

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """Normal noise (batch, *shape)."""
        return torch.randn(self.total, *shape, generator=self.samples)[self.own]

    def score_sigmas(self, distiller: PhasedDistiller, boundary: float | None = None, groups: int = 1) -> Tensor:
        """Where fake and teacher are compared, shape (batch,).

        Networks in shards run on all processes at once, and a network that one sample needs is computed for nothing on
        all other processes. So the samples of a group, which every process has as many of, are on one side of the
        boundary: the side of a group is drawn first, each with its share, and then sigmas on it. Each sigma has the
        distribution that it has without groups.

        Args:
            distiller: The phase in training.
            boundary: Sigma from which the first of a teacher's two networks runs; None for one network.
            groups: Samples i, i + groups, ... are a group.
        """
        shares = torch.rand(self.total, generator=self.samples, dtype=torch.float64)[self.own]
        below = distiller.score_share_below(boundary) if boundary is not None else 0.0
        if boundary is None or not 0 < below < 1:
            return distiller.score_sigma_at(shares)
        first = float(torch.rand((), generator=self.shared, dtype=torch.float64))
        low = (first + torch.arange(groups, dtype=torch.float64) / groups) % 1 < below  # evenly over the groups
        low = low.repeat(len(shares) // groups)
        sigmas = distiller.score_sigma_at(torch.where(low, below * shares, below + (1 - below) * shares))
        at = torch.tensor(boundary)  # rounding must not bring a sigma over
        return torch.where(low, sigmas.minimum(at.nextafter(at - 1)), sigmas.maximum(at.nextafter(at + 1)))

    def state_dict(self) -> dict[str, Tensor]:
        """The states of both generators and of the order of examples."""
        return {"shared": self.shared.get_state(), "samples": self.samples.get_state(), "order": self.order.state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.shared.set_state(state["shared"])
        self.samples.set_state(state["samples"])
        self.order.load_state(state["order"])

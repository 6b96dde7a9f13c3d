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

    def score_sigmas(self, distiller: PhasedDistiller) -> Tensor:
        """Where fake and teacher are compared, shape (batch,)."""
        return distiller.draw_score_sigma(self.total, self.samples)[self.own]

    def state_dict(self) -> dict[str, Tensor]:
        """The states of both generators and of the order of examples."""
        return {"shared": self.shared.get_state(), "samples": self.samples.get_state(), "order": self.order.state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.shared.set_state(state["shared"])
        self.samples.set_state(state["samples"])
        self.order.load_state(state["order"])

"""Everything that is random in a run once its weights exist."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from pdmd_core.distillation import PhasedDistiller
from training.data.order import ExampleOrder


class RunRNG:
    """Examples, noise and sigmas of the updates.

    Every sample of a draw has a generator of its own, which the seed, the number of the draw and the place of the
    sample in the batch decide. So a process draws its own rows alone, on its device, and how many processes share a
    batch changes none of its samples. The rest is the same on all processes: one state is enough for a checkpoint.

    Args:
        seed: Of everything here.
        batch: Samples of all processes.
        order: Of the examples.
        rank: Of this process, or of its group of processes that share samples.
        processes: How many such processes or groups there are.
        device: Where noise is drawn.
    """

    def __init__(
        self,
        seed: int,
        batch: int,
        order: ExampleOrder,
        rank: int = 0,
        processes: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.seed, self.total, self.device = seed, batch, device
        self.order, self.rank, self.processes = order, rank, processes
        self.shared = torch.Generator().manual_seed(seed)
        """What is one for a whole batch: the step that trains, fresh weights of a role."""
        self.draws = 0
        """How often samples were given something of their own."""
        own = batch // processes
        self.own = range(rank * own, (rank + 1) * own)

    def examples(self) -> tuple[int, Tensor]:
        """The bucket of the next batch, and which of its examples are this process's, shape (batch,)."""
        return self.order.draw(self.total, self.rank, self.processes)

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """Normal noise (batch, *shape) on the device."""
        rows = self._generators(self.device)
        return torch.stack([torch.randn(shape, generator=row, device=self.device) for row in rows])

    def _generators(self, device: torch.device | str) -> Iterator[torch.Generator]:
        """One for each of this process's samples, of one draw."""
        draw, self.draws = self.draws, self.draws + 1
        for sample in self.own:
            digest = hashlib.sha256(f"{self.seed} {draw} {sample}".encode()).digest()
            yield torch.Generator(device).manual_seed(int.from_bytes(digest[:7]))

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
        rows = self._generators("cpu")
        shares = torch.stack([torch.rand((), generator=row, dtype=torch.float64) for row in rows])
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
        """Where the shared generator, the draws and the order of examples are."""
        draws = torch.tensor([self.seed, self.draws])
        return {"shared": self.shared.get_state(), "draws": draws, "order": self.order.state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.shared.set_state(state["shared"])
        self.seed, self.draws = state["draws"].tolist()
        self.order.load_state(state["order"])

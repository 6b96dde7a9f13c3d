"""The batches of a run: examples and noise for rollouts, and where the scores of their samples are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pdmd_core.batch import Batch, Renoising
from pdmd_core.distillation import PhasedDistiller
from training.loop.rng import RunRNG
from training.loop.rollout_bank import RolloutBank


class Batches(Protocol):
    """Where the updates of a phase get everything that is random."""

    def draw(self, negative: bool = False) -> Batch:
        """Draw noise and conditioning for this process's samples, with the negative conditioning when asked.

        Conditioning may be on the CPU: it goes to the device part by part.
        """

    def step(self, distiller: PhasedDistiller) -> int:
        """Draw the step inside the phase that trains, the same on all processes."""

    def renoising(self, distiller: PhasedDistiller, like: Tensor) -> Renoising:
        """Draw where the scores of samples of this shape are compared."""


class Conditionings(Protocol):
    """Conditioning of examples by their index, as ``data.prompt_cache.PromptCache`` keeps it."""

    def conditioning(self, indices: Tensor, device: torch.device) -> Mapping[str, Tensor]: ...

    def conditioning_pair(
        self, indices: Tensor, device: torch.device
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]: ...


class DataBatches:
    """Batches of the examples of a run.

    Attributes:
        bank: What rollouts begin with; None for noise.

    Args:
        rng: Everything that is random in a run.
        prompts: Conditioning of the examples.
        shapes: Shape of a latent in each bucket, without the batch.
        boundary: Sigma from which the first of a teacher's two networks runs; None for one network.
        score_groups: Groups of a batch that are each compared on one of two networks.
    """

    def __init__(
        self,
        rng: RunRNG,
        prompts: Conditionings,
        shapes: Sequence[tuple[int, ...]],
        boundary: float | None = None,
        score_groups: int = 1,
    ) -> None:
        self.bank: RolloutBank | None = None
        self.rng, self.prompts, self.shapes = rng, prompts, shapes
        self.boundary, self.score_groups = boundary, score_groups

    def draw(self, negative: bool = False) -> Batch:
        """Draw the next examples and their noise."""
        bucket, indices = self.rng.examples()
        if self.bank is not None:
            noise, indices = self.bank.rows(indices, self.rng.device)
        else:
            noise = self.rng.noise(self.shapes[bucket])
        begun = self.bank is not None
        if negative:
            return Batch(noise, *self.prompts.conditioning_pair(indices, torch.device("cpu")), begun)
        return Batch(noise, self.prompts.conditioning(indices, torch.device("cpu")), {}, begun)

    def step(self, distiller: PhasedDistiller) -> int:
        """Draw the step that trains from the generator that all processes share."""
        return distiller.draw_step(self.rng.shared)

    def renoising(self, distiller: PhasedDistiller, like: Tensor) -> Renoising:
        """Draw a sigma and noise for each of this process's samples."""
        t = self.rng.score_sigmas(distiller, self.boundary, self.score_groups)
        return Renoising(t, self.rng.noise(like.shape[1:]))

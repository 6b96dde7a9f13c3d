"""What an update is given: the noise and conditioning of its samples, and where scores are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .families import Conditioning

Rows = slice | Tensor
"""Some of the samples of a batch: a slice, or indices of shape (samples,)."""


@dataclass(frozen=True)
class Batch:
    """What rollouts start from: noise, and what the samples are to show."""

    noise: Tensor
    """Standard normal noise of shape (batch, ...) at sigma 1; or, where the rollouts have begun, what the experts of
    earlier phases made of it, at the first sigma of the phase, and with denoising what the teacher made of it."""
    conditioning: Conditioning
    """The conditioning of each sample: name to tensor of shape (batch, ...)."""
    negative: Conditioning = field(default_factory=dict)
    """The same with the negative prompt, from which guidance moves away; empty where no teacher is asked."""
    begun: bool = False
    """Whether the experts of earlier phases have run, or the teacher whose samples are denoised."""

    def __len__(self) -> int:
        """Count the samples.

        Returns:
            The size of the batch.
        """
        return len(self.noise)

    def rows(self, part: Rows) -> Batch:
        """Take some of the samples.

        Args:
            part: Which ones.

        Returns:
            A batch of those.
        """
        return Batch(self.noise[part], rows_of(self.conditioning, part), rows_of(self.negative, part), self.begun)


@dataclass(frozen=True)
class Renoising:
    """Where scores are compared: a noise level for each sample, and the noise that brings it there."""

    t: Tensor
    """Sigmas of shape (batch,), between the end of the phase and 1."""
    noise: Tensor
    """Standard normal noise of shape (batch, ...)."""

    def rows(self, part: Rows) -> Renoising:
        """Take some of the samples.

        Args:
            part: Which ones.

        Returns:
            The noise levels and the noise of those.
        """
        return Renoising(self.t[part], self.noise[part])


PROMPT_MASK = "prompt_mask"
"""Which tokens of a prompt are there, of shape (batch, tokens); it may stay on the CPU, where what depends on it is
decided without waiting for a device."""


def without_padding(*conditionings: Conditioning) -> list[dict[str, Tensor]]:
    """Cut prompts after the last token that one of them has, where a mask says which are there.

    Args:
        *conditionings: Name to tensor of shape (batch, ...); those with a ``prompt_mask`` become equally long.

    Returns:
        The same names; the values are views.
    """
    masks = [conditioning[PROMPT_MASK] for conditioning in conditionings if PROMPT_MASK in conditioning]
    if not masks:
        return [dict(conditioning) for conditioning in conditionings]
    width = max(int(mask.any(0).nonzero().max()) + 1 if bool(mask.any()) else 1 for mask in masks)
    return [
        {name: value[:, :width] if name.startswith("prompt_") else value for name, value in conditioning.items()}
        for conditioning in conditionings
    ]


def as_rows(indices: Tensor) -> Rows:
    """Take neighbours as a slice, which needs no indices on the device.

    Args:
        indices: Places in a batch, ascending, of shape (samples,), on the CPU.

    Returns:
        The slice that has them, or the indices themselves where there are others between.
    """
    first, last = int(indices[0]), int(indices[-1])
    return slice(first, last + 1) if last - first + 1 == len(indices) else indices


def in_groups(
    groups: Tensor,
    evaluate: Callable[[int, Tensor, Tensor, Conditioning], Tensor],
    x: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
) -> Tensor:
    """Evaluate each sample by what its group is evaluated by, a group at a time.

    Args:
        groups: The number of each sample's group, of shape (batch,).
        evaluate: Called with the number of a group, and samples, sigmas and conditioning of its samples.
        x: Samples of shape (batch, ...).
        sigma: Their noise levels, of shape (batch,).
        conditioning: Name to tensor of shape (batch, ...).

    Returns:
        The results in the order of the samples.
    """
    numbers: list[int] = groups.unique().tolist()
    if len(numbers) == 1:
        return evaluate(numbers[0], x, sigma, conditioning)
    rows = [(groups == number).nonzero().flatten() for number in numbers]
    parts = [
        evaluate(number, x[own], sigma[own], rows_of(conditioning, own))
        for number, own in zip(numbers, rows, strict=True)
    ]
    return torch.cat(parts)[torch.cat(rows).argsort()]


def rows_of(conditioning: Conditioning, part: Rows) -> dict[str, Tensor]:
    """Take the conditioning of some of the samples.

    Args:
        conditioning: Name to tensor of shape (batch, ...).
        part: A slice, or indices of shape (samples,).

    Returns:
        The same names with those rows.
    """
    return {name: value[part] for name, value in conditioning.items()}

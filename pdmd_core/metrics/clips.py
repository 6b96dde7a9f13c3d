"""Features of clips for a Frechet distance of video, in a space that is stated: what frames show and how they move.

It is no FVD, whose features are those of a network trained on actions: name it after the network of the frames, as in
"FD-EffLite0+flow".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .motion import flow_length

_CELLS = 2
"""Flow statistics are taken in this many cells along each side."""


def clip_features(frames: Tensor, flow: Tensor) -> Tensor:
    """One vector for each clip: frame features and flow statistics side by side.

    frames: features of single frames, (clips, frames, dimensions); mean and standard deviation over time are kept.
    flow:   of ``motion.optical_flow``, (clips, pairs, 2, height, width) in pixels; in each quarter of the frame the
            mean of x, of y and of the length, over pixels, then mean and standard deviation over time.

    Returns (clips, 2 * dimensions + 24). The two parts have different units: use ``standardised`` before a distance.
    """
    if frames.ndim != 3 or flow.ndim != 5 or frames.shape[0] != flow.shape[0] or flow.shape[2] != 2:
        raise ValueError(
            f"expected frame features (clips, frames, dimensions) and flow (clips, pairs, 2, height, width) of the "
            f"same clips, found {tuple(frames.shape)} and {tuple(flow.shape)}"
        )
    return torch.cat([over_time(frames), flow_statistics(flow).to(frames.device)], dim=1)


def flow_statistics(flow: Tensor) -> Tensor:
    """The part of ``clip_features`` that says how a clip moves: (clips, pairs, 2, height, width) to (clips, 24)."""
    fields = torch.cat([flow, flow_length(flow)[:, :, None]], dim=2).double()
    return over_time(F.adaptive_avg_pool2d(fields.flatten(0, 1), _CELLS).unflatten(0, flow.shape[:2]).flatten(2))


def over_time(values: Tensor) -> Tensor:
    """Mean and standard deviation over frames: (clips, frames, dimensions) to (clips, 2 * dimensions)."""
    values = values.double()
    return torch.cat([values.mean(1), values.std(1, correction=0)], dim=1)


def standardised(reference: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The sets (count, dimensions), each dimension in units of the reference's standard deviation about its mean.

    A dimension in which the reference does not vary keeps its unit.
    """
    mean, deviation = reference.double().mean(0), reference.double().std(0)
    deviation = torch.where(deviation > 1e-6 * deviation.max().clamp(min=1e-12), deviation, 1.0)
    return tuple((features.double() - mean) / deviation for features in (reference, *others))

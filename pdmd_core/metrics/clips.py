"""Features of clips for a Frechet distance of video, in a stated space: what frames show and how they move.

A distance in these features is no FVD, whose features come from a network that was trained on actions. Name it after
the network of the frames, as in "FD-EffLite0+flow".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .motion import flow_length

_CELLS = 2
"""Flow statistics are taken in this many cells along each side of the frame."""


def clip_features(frames: Tensor, flow: Tensor) -> Tensor:
    """Join frame features and flow statistics into one feature vector for each clip.

    The two parts have different units: apply ``standardised`` before a distance is taken.

    Args:
        frames: Features of single frames, of shape (clips, frames, dimensions). Their mean and standard deviation over
            time are kept.
        flow: Optical flow from ``optical_flow``, of shape (clips, pairs, 2, height, width), in pixels. In each quarter
            of the frame, the means over pixels of x, of y and of the length are taken, then mean and standard deviation
            over time.

    Returns:
        Features of shape (clips, 2 * dimensions + 24), in float64.

    Raises:
        ValueError: If the shapes are others or belong to different numbers of clips.
    """
    if frames.ndim != 3 or flow.ndim != 5 or frames.shape[0] != flow.shape[0] or flow.shape[2] != 2:
        raise ValueError(
            f"expected frame features (clips, frames, dimensions) and flow (clips, pairs, 2, height, width) of the "
            f"same clips, found {tuple(frames.shape)} and {tuple(flow.shape)}"
        )
    return torch.cat([over_time(frames), flow_statistics(flow).to(frames.device)], dim=1)


def flow_statistics(flow: Tensor) -> Tensor:
    """Describe how each clip moves: the part of ``clip_features`` that comes from the optical flow.

    Args:
        flow: Optical flow of shape (clips, pairs, 2, height, width), in pixels.

    Returns:
        Features of shape (clips, 24), in pixels and float64.
    """
    fields = torch.cat([flow, flow_length(flow)[:, :, None]], dim=2).double()
    return over_time(F.adaptive_avg_pool2d(fields.flatten(0, 1), _CELLS).unflatten(0, flow.shape[:2]).flatten(2))


def over_time(values: Tensor) -> Tensor:
    """Take the mean and the standard deviation over frames.

    Args:
        values: Features of shape (clips, frames, dimensions).

    Returns:
        Features of shape (clips, 2 * dimensions), in float64.
    """
    values = values.double()
    return torch.cat([values.mean(1), values.std(1, correction=0)], dim=1)


def standardised(reference: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Express every dimension in units of the reference's standard deviation, counted from its mean.

    A dimension in which the reference does not vary keeps its unit.

    Args:
        reference: Features of shape (count, dimensions) that set the scale.
        *others: More sets of features with the same dimensions.

    Returns:
        The reference and the others in the new units, in float64.
    """
    mean, deviation = reference.double().mean(0), reference.double().std(0)
    deviation = torch.where(deviation > 1e-6 * deviation.max().clamp(min=1e-12), deviation, 1.0)
    return tuple((features.double() - mean) / deviation for features in (reference, *others))

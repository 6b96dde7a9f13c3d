"""Motion of clips: how much moves, in how many clips, and how smoothly. The optical flow is OpenCV's DIS.

Dense inverse search is from Kroeger et al. 2016, arXiv 1603.03590. Dynamic degree and motion smoothness follow VBench,
arXiv 2311.17982, which uses RAFT and a learned interpolation: compare values between methods here, not with VBench's.
This module needs opencv-python-headless.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .intervals import Estimate, mean_of_units, share

DYNAMIC_THRESHOLD = 6 / 256
"""The flow per frame, as a share of the frame's shorter side, above which a pair of frames is dynamic."""
_FASTEST = 0.05
"""The share of pixels, the fastest, whose mean flow is compared with the threshold."""
_DYNAMIC_PAIRS = 0.25
"""The share of pairs of frames that must be dynamic for the clip to be."""


@dataclass(frozen=True)
class Motion:
    """Motion of a set of clips, with 95 % intervals over clips."""

    flow: Estimate
    """The mean length of the optical flow over pixels and pairs of neighbouring frames, in pixels per frame."""
    dynamic_degree: Estimate
    """The share of clips in which something moves fast, as ``is_dynamic`` defines it."""
    smoothness: Estimate
    """The mean of ``smoothness`` over clips; NaN for clips of two frames."""
    threshold: float
    """The threshold of the dynamic degree, in pixels per frame."""


def motion(clips: Tensor, threshold: float = DYNAMIC_THRESHOLD) -> Motion:
    """Measure the motion of clips: flow, dynamic degree and smoothness.

    Args:
        clips: Pixels of shape (count, frames, 3, height, width), in [0, 1], with at least 2 frames of at least 16
            pixels a side.
        threshold: The flow per frame above which a pair of frames is dynamic, as a share of the shorter side.

    Returns:
        The measures with their intervals.

    Raises:
        ValueError: If the clips have another shape.

    Examples:
        >>> import torch
        >>> picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> moving = torch.stack([picture.roll(2 * frame, dims=-1) for frame in range(4)])
        >>> still = picture.expand(4, 3, 32, 32)
        >>> motion(torch.stack([moving, still])).dynamic_degree.value
        0.5
    """
    flow = optical_flow(clips)
    nothing = Estimate(float("nan"), float("nan"), float("nan"), len(clips))
    return Motion(
        flow=mean_of_units(flow_length(flow).flatten(1).mean(1)),
        dynamic_degree=share(is_dynamic(flow, threshold)),
        smoothness=mean_of_units(smoothness(clips)) if clips.shape[1] > 2 else nothing,
        threshold=threshold * min(clips.shape[-2:]),
    )


def optical_flow(clips: Tensor) -> Tensor:
    """Compute the optical flow from each frame to the next.

    Args:
        clips: Pixels of shape (count, frames, 3, height, width), in [0, 1], with at least 2 frames of at least 16
            pixels a side.

    Returns:
        Flow of shape (count, frames - 1, 2, height, width), in pixels, x before y.

    Raises:
        ValueError: If the clips have another shape.
    """
    _check(clips, frames=2)
    return torch.stack([_flow_between(clip[:-1], clip[1:]) for clip in clips])


def flow_length(flow: Tensor) -> Tensor:
    """Compute the length of the flow of each pixel.

    Args:
        flow: Optical flow of shape (clips, pairs, 2, height, width), in pixels.

    Returns:
        Lengths of shape (clips, pairs, height, width), in pixels.
    """
    lengths: Tensor = flow.norm(dim=2)
    return lengths


def is_dynamic(flow: Tensor, threshold: float = DYNAMIC_THRESHOLD) -> Tensor:
    """Decide for each clip whether something in it moves fast.

    A pair of frames is dynamic when its fastest 5 % of the pixels move by more than the threshold on average; a clip is
    dynamic when a quarter of its pairs are.

    Args:
        flow: Optical flow of shape (clips, pairs, 2, height, width), in pixels.
        threshold: The flow per frame, as a share of the frame's shorter side.

    Returns:
        Booleans of shape (clips,).
    """
    lengths = flow_length(flow).flatten(2)
    fastest = lengths.topk(max(1, round(_FASTEST * lengths.shape[-1])), dim=-1).values.mean(-1)
    return (fastest > threshold * min(flow.shape[-2:])).double().mean(1) >= _DYNAMIC_PAIRS


def smoothness(clips: Tensor) -> Tensor:
    """Measure how well each frame agrees with what its two neighbours predict for it.

    The prediction is the mean of both neighbours, each moved by half of the optical flow between them: exact for steady
    motion, wrong for what jumps, flickers or changes shape.

    Args:
        clips: Pixels of shape (count, frames, 3, height, width), in [0, 1], with at least 3 frames of at least 16
            pixels a side.

    Returns:
        ``1 - mean |frame - prediction|`` of each clip, of shape (count,); 1 is perfectly smooth.

    Raises:
        ValueError: If the clips have another shape.
    """
    _check(clips, frames=3)
    values = []
    for clip in clips:
        before, after = clip[:-2].float(), clip[2:].float()
        forward, backward = _flow_between(before, after), _flow_between(after, before)
        # at the middle frame, content has come half the way from either side
        middle = (_moved(before, -forward / 2) + _moved(after, -backward / 2)) / 2
        values.append(1 - (clip[1:-1].float() - middle).abs().mean())
    return torch.stack(values)


def _check(clips: Tensor, frames: int) -> None:
    if clips.ndim != 5 or clips.shape[1] < frames or clips.shape[2] != 3 or min(clips.shape[-2:]) < 16:
        raise ValueError(
            f"expected clips of shape (count, frames >= {frames}, 3, height >= 16, width >= 16), "
            f"found {tuple(clips.shape)}"
        )


def _flow_between(first: Tensor, second: Tensor) -> Tensor:
    """The flow from frames (count, 3, height, width) to others, of shape (count, 2, height, width)."""
    import cv2
    import numpy as np

    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    search.setFinestScale(0)  # small frames have no scale to spare
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # luma, ITU-R BT.601

    def grey(frames: Tensor) -> Tensor:
        return ((frames.detach().float().cpu() * weights).sum(1) * 255).round().clamp(0, 255).byte()

    flows = []
    for a, b in zip(grey(first).numpy(), grey(second).numpy(), strict=True):
        still = np.zeros((*a.shape, 2), np.float32)
        flows.append(torch.from_numpy(np.asarray(search.calc(a, b, still))).permute(2, 0, 1))
    return torch.stack(flows)


def _moved(frames: Tensor, flow: Tensor) -> Tensor:
    """Read frames (count, 3, height, width) at each pixel plus flow (count, 2, height, width), bilinearly."""
    height, width = frames.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([x, y]).float() + flow
    size = torch.tensor([width, height]).view(2, 1, 1)
    grid = ((2 * place + 1) / size - 1).permute(0, 2, 3, 1)
    return F.grid_sample(frames.cpu(), grid, mode="bilinear", padding_mode="border", align_corners=False)

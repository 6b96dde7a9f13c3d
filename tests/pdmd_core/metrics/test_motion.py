"""Clips whose motion is known exactly: a smooth texture that is shifted by whole or broken numbers of pixels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pdmd_core.metrics import clip_features, frechet_distance, motion, optical_flow, standardised
from pdmd_core.metrics.motion import flow_length, is_dynamic, smoothness

SIZE = 64


def texture(x: Tensor, y: Tensor, seed: int = 0) -> Tensor:
    """A sum of waves of random direction and phase in [0, 1], at any place: shape (3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    channels = []
    for _ in range(3):
        waves = 2 * math.pi * (torch.rand(12, 2, generator=generator) - 0.5) / 6
        phases = 2 * math.pi * torch.rand(12, 1, 1, generator=generator)
        angle = waves[:, 0, None, None] * x + waves[:, 1, None, None] * y + phases
        channels.append(angle.sin().mean(0))
    return (0.5 + torch.stack(channels)).clamp(0, 1)


def shifted(places: list[tuple[float, float]], seed: int = 0) -> Tensor:
    """One clip: the texture moved to each of these places (x, y), in pixels."""
    y, x = torch.meshgrid(torch.arange(SIZE).float(), torch.arange(SIZE).float(), indexing="ij")
    return torch.stack([texture(x - dx, y - dy, seed) for dx, dy in places])


def moving(dx: float, dy: float, frames: int = 5, seed: int = 0) -> Tensor:
    return shifted([(i * dx, i * dy) for i in range(frames)], seed)


INSIDE = (..., slice(12, -12), slice(12, -12))
"""Away from the edges, where content comes in that was not there before."""


@pytest.mark.parametrize(("dx", "dy"), [(2.0, 0.0), (0.0, -3.0), (1.5, 2.5), (-0.5, 0.25)])
def test_the_flow_of_a_shifted_clip_is_the_shift(dx: float, dy: float) -> None:
    flow = optical_flow(moving(dx, dy)[None])
    assert flow.shape == (1, 4, 2, SIZE, SIZE)
    found = flow[INSIDE].mean((0, 1, 3, 4))
    assert found.tolist() == pytest.approx([dx, dy], abs=0.08)
    assert flow_length(flow)[INSIDE].std() < 0.25


def test_the_mean_flow_of_a_shifted_clip_is_the_length_of_the_shift() -> None:
    clips = torch.stack([moving(3.0, 4.0, seed=seed) for seed in range(3)])
    found = motion(clips)
    assert found.flow.value == pytest.approx(5, rel=0.06)
    assert found.flow.samples == 3
    assert found.flow.low <= found.flow.value <= found.flow.high


def test_a_still_clip_has_no_motion_and_is_perfectly_smooth() -> None:
    found = motion(moving(0, 0)[None].repeat(2, 1, 1, 1, 1))
    assert found.flow.value < 1e-3
    assert found.dynamic_degree.value == 0
    assert found.smoothness.value == pytest.approx(1, abs=1e-3)


def test_dynamic_degree_is_the_share_of_clips_above_the_threshold() -> None:
    clips = torch.stack([moving(speed, 0.0) for speed in (0.0, 0.5, 1.0, 2.5, 4.0)])
    found = motion(clips)
    assert found.threshold == pytest.approx(1.5)  # 6 / 256 of 64 pixels
    assert found.dynamic_degree.value == pytest.approx(2 / 5)
    assert motion(clips, threshold=0.75 / 64).dynamic_degree.value == pytest.approx(3 / 5)


def test_a_clip_is_dynamic_when_its_fastest_twentieth_moves_in_a_quarter_of_the_pairs() -> None:
    flow = torch.zeros(4, 8, 2, 20, 20)
    flow[0, :2, 0, 0] = 9.0  # 20 of 400 pixels in 2 of 8 pairs
    flow[1, :1, 0, 0] = 9.0  # in 1 of 8
    flow[2, :, 1, 0, :4] = 9.0  # 4 of 400 pixels: 1.8 on average over the fastest 20
    flow[3, :, :, 0] = 0.9  # long enough only with both directions
    assert is_dynamic(flow, threshold=2 / 20).tolist() == [True, False, False, False]
    assert is_dynamic(flow, threshold=1.2 / 20).tolist() == [True, False, True, True]


def test_steady_motion_is_smoother_than_a_jitter_of_the_same_flow() -> None:
    steady = moving(2.0, 1.0, frames=7)
    jitter = shifted([(2.0 * (i % 2), 1.0 * (i % 2)) for i in range(7)])
    smooth, rough = smoothness(torch.stack([steady, jitter])).tolist()
    assert smooth > 0.98
    assert rough < smooth - 0.03
    lengths = [float(flow_length(optical_flow(clip[None])).mean()) for clip in (steady, jitter)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.1)


def test_flicker_costs_smoothness() -> None:
    clip = moving(1.0, 0.0, frames=5)
    flicker = clip.clone()
    flicker[2] = (flicker[2] * 0.6).clamp(0, 1)
    values = smoothness(torch.stack([clip, flicker])).tolist()
    # a third of the frames that have neighbours is off by 40 % of its brightness
    assert values[0] - values[1] > 0.4 * float(clip[2].mean()) / 3


def test_clips_of_two_frames_have_no_smoothness() -> None:
    found = motion(moving(2.0, 0.0, frames=2)[None])
    assert found.flow.value == pytest.approx(2, rel=0.1)
    assert math.isnan(found.smoothness.value)


@pytest.mark.parametrize("shape", [(2, 1, 3, 32, 32), (2, 4, 1, 32, 32), (4, 3, 32, 32), (1, 4, 3, 8, 32)])
def test_what_is_no_clip_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected clips of shape"):
        motion(torch.zeros(shape))
    with pytest.raises(ValueError, match="frames >= 3"):
        smoothness(torch.zeros(1, 2, 3, 32, 32))


# --- features of clips ---------------------------------------------------------------------------------------------


def test_clip_features_hold_what_frames_show_and_how_each_quarter_moves() -> None:
    frames = torch.tensor([[[1.0, 5.0], [3.0, 5.0]]])
    flow = torch.zeros(1, 2, 2, 4, 4)
    flow[0, :, 0, :2, :2] = 3.0  # the first quarter moves by (3, 4), the last by (0, 2) in the second pair only
    flow[0, :, 1, :2, :2] = 4.0
    flow[0, 1, 1, 2:, 2:] = 2.0
    found = clip_features(frames, flow)[0]
    assert found[:2].tolist() == [2, 5]  # mean over time
    assert found[2:4].tolist() == [1, 0]  # deviation over time
    quarters = torch.tensor([[3, 0, 0, 0], [4, 0, 0, 1], [5, 0, 0, 1]])  # x, y, length
    assert found[4:16].tolist() == quarters.flatten().tolist()
    assert found[16:].tolist() == [0] * 7 + [1] + [0] * 3 + [1]


def test_the_distance_of_clips_sees_motion_that_frames_do_not_show() -> None:
    """The same frames, played forwards or backwards: frame features agree, the flow does not."""
    forwards = torch.stack([moving(2.0, 0.0, seed=seed) for seed in range(12)])
    backwards = forwards.flip(1)
    frames = forwards.flatten(3).mean(3)
    features = [clip_features(f, optical_flow(c)) for f, c in ((frames, forwards), (frames.flip(1), backwards))]
    torch.testing.assert_close(features[0][:, :6], features[1][:, :6])
    first, second = standardised(*features)
    assert frechet_distance(first, second) > 10
    assert frechet_distance(first, first) < 1e-6


def test_standardised_sets_are_in_units_of_the_reference() -> None:
    reference = 3 + 2 * torch.randn(500, 2)
    reference = torch.cat([reference, torch.full((500, 1), 7.0)], dim=1)  # a dimension that does not vary
    own, other = standardised(reference, reference + torch.tensor([2.0, 0.0, 1.0]))
    assert own.mean(0).tolist() == pytest.approx([0, 0, 0], abs=1e-9)
    assert own.std(0).tolist() == pytest.approx([1, 1, 0])
    assert (other - own)[:, 0].mean() == pytest.approx(2 / float(reference[:, 0].double().std()))
    assert (other - own)[:, 2].tolist() == pytest.approx([1.0] * 500)


def test_clip_features_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="of the same clips, found"):
        clip_features(torch.zeros(3, 4, 5), torch.zeros(2, 3, 2, 16, 16))

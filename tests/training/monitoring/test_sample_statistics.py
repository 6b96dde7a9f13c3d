"""What is seen in samples, from pictures whose numbers are known."""

from __future__ import annotations

import pytest
import torch

from training.monitoring.sample_statistics import sample_statistics, thumbnails
from training.monitoring.weight_drift import WeightDrift


def flat(*colours: tuple[float, float, float], frames: int = 1) -> torch.Tensor:
    return torch.tensor(colours).view(-1, 1, 3, 1, 1).expand(-1, frames, -1, 32, 32)


def test_flat_pictures_have_the_numbers_of_their_colours() -> None:
    look = sample_statistics(flat((0.2, 0.2, 0.2), (0.6, 0.4, 0.2)), seeds=1)
    assert look.diversity is None
    assert look.saturation == pytest.approx(0.2) and look.contrast == pytest.approx(0) and look.clipped == 0


def test_diversity_is_between_seeds_of_a_prompt_and_not_between_prompts() -> None:
    black, grey, white = (0.0,) * 3, (0.5,) * 3, (1.0,) * 3
    assert sample_statistics(flat(black, black, white, white), seeds=2).diversity == pytest.approx(0)
    assert sample_statistics(flat(black, white, grey, grey), seeds=2).diversity == pytest.approx(0.5)


def test_contrast_and_clipping_of_a_half_black_half_white_picture() -> None:
    picture = torch.zeros(1, 1, 3, 32, 32)
    picture[..., 16:] = 1
    look = sample_statistics(picture, seeds=1)
    assert look.contrast == pytest.approx(0.5, rel=1e-3) and look.clipped == 1 and look.saturation == 0


def test_clips_are_looked_at_from_their_first_to_their_last_frame() -> None:
    clip = flat((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), frames=9).clone()
    assert sample_statistics(clip, seeds=2).diversity == 0
    clip[1, -1] = 1.0
    assert sample_statistics(clip, seeds=2).diversity == pytest.approx((0.5**2 / 4) ** 0.5)


def test_motion_is_the_way_of_the_weights_relative_to_their_size() -> None:
    still, large = torch.nn.Parameter(torch.ones(10)), torch.nn.Parameter(torch.full((100, 100), 2.0))
    motion = WeightDrift([still, large])
    assert motion.measure() == (0.0, 0.0)
    with torch.no_grad():
        large += 0.02
    moved, changed = motion.measure()
    assert moved == pytest.approx(0.02 / 2.02, rel=1e-2) and changed > 0.99


def test_steps_that_vanish_are_seen_as_weights_that_do_not_change() -> None:
    weights = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    motion = WeightDrift([weights])
    with torch.no_grad():
        for _ in range(100):
            weights -= 4e-4
    assert motion.measure() == (0.0, 0.0)


def test_the_distance_to_the_teacher_is_1_for_samples_of_other_prompts() -> None:
    """Two prompts, two seeds each, of which every one is as far from those of the other prompt."""
    teacher = flat((0.0,) * 3, (0.0,) * 3, (0.5,) * 3, (0.5,) * 3)
    exchanged = teacher.roll(2, 0)
    own = thumbnails(teacher)
    assert sample_statistics(teacher, 2, own).teacher_distance == 0
    assert sample_statistics(exchanged, 2, own).teacher_distance == pytest.approx(1)
    assert sample_statistics((teacher + exchanged) / 2, 2, own).teacher_distance == pytest.approx(0.5)
    assert sample_statistics(teacher, 2).teacher_distance is None


def test_the_motion_of_clips_is_between_neighbouring_frames() -> None:
    clip = flat((0.5, 0.5, 0.5), frames=5).clone()
    assert sample_statistics(clip, 1).motion == 0
    clip[:, 1::2] += 0.2
    assert sample_statistics(clip, 1).motion == pytest.approx(0.2)
    assert sample_statistics(flat((0.5, 0.5, 0.5)), 1).motion is None

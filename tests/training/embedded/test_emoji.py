"""Scenes: captions, and where things are and go (a plain disc stands in for the artwork)."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from training.embedded import emoji as emoji_module
from training.embedded.emoji import (
    BACKGROUNDS,
    EMOJI,
    FRAMES,
    MOTIONS,
    EmojiScenes,
    all_captions,
    caption,
    load_sprites,
)


@pytest.fixture
def scenes() -> EmojiScenes:
    place = torch.linspace(-1, 1, 56)
    disc = ((place[:, None] ** 2 + place[None, :] ** 2) < 0.8).float()
    sprites = torch.stack([0 * disc, disc, 0 * disc, disc]).expand(len(EMOJI), -1, -1, -1)
    with mock.patch.object(emoji_module, "load_sprites", return_value=sprites):
        return EmojiScenes(seed=1)


def centres(pixels: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """Centre (x, y) in pixels of what is not background: pixels (batch, 3, frames, 64, 64) to (batch, frames, 2)."""
    plain = torch.tensor(list(BACKGROUNDS.values()))[background] / 127.5 - 1
    weight = (pixels - plain[:, :, None, None, None]).abs().sum(1)
    grid = torch.arange(64) + 0.5
    x = (weight * grid[None, None, None, :]).sum((2, 3)) / weight.sum((2, 3))
    y = (weight * grid[None, None, :, None]).sum((2, 3)) / weight.sum((2, 3))
    return torch.stack([x, y], -1)


def test_captions_are_unique_and_have_the_right_article() -> None:
    pictures, clips = all_captions(), all_captions(clips=True)
    assert len(set(pictures)) == len(pictures) == len(EMOJI) * len(BACKGROUNDS)
    assert len(set(clips)) == len(clips) == len(pictures) * len(MOTIONS)
    assert caption("owl", "red", "spins") == "an owl spins on a red background"
    assert caption("fox", "red") == "a fox on a red background"


def test_the_shipped_prompt_files_are_the_vocabulary() -> None:
    folder = Path(emoji_module.__file__).parents[1] / "prompts"

    def lines(name: str) -> list[str]:
        return (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines()[1:]

    assert lines("embedded_pictures") == all_captions()
    assert lines("embedded_clips") == all_captions(clips=True)
    assert set(lines("embedded_eval")) <= set(all_captions())


def test_pictures_have_the_caption_s_background_and_differ_in_place(scenes: EmojiScenes) -> None:
    batch = scenes.pictures(64)
    assert batch.pixels.shape == (64, 3, 1, 64, 64)
    assert batch.pixels.abs().max() <= 1
    names = list(BACKGROUNDS)
    assert all(
        text.endswith(f"{names[int(b)]} background") for text, b in zip(batch.captions, batch.background, strict=True)
    )
    place = centres(batch.pixels, batch.background)[:, 0]
    assert (place > 10).all()
    assert (place < 54).all()
    assert (place.std(0) > 4).all()


def test_clips_move_as_their_captions_say(scenes: EmojiScenes) -> None:
    batch = scenes.clips(120)
    assert batch.pixels.shape == (120, 3, FRAMES, 64, 64)
    place = centres(batch.pixels, batch.background)
    travel = place[:, -1] - place[:, 0]
    wanted = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}
    seen = set()
    for text, moved in zip(batch.captions, travel, strict=True):
        direction = next((d for name, d in wanted.items() if name in text), (0, 0))
        seen.add(direction)
        for axis in (0, 1):
            if direction[axis]:
                assert 1.4 * (FRAMES - 1) < float(moved[axis]) * direction[axis] < 3.6 * (FRAMES - 1)
            else:
                assert abs(float(moved[axis])) < 1
    assert len(seen) == 5


def test_the_seed_decides_the_scenes(scenes: EmojiScenes) -> None:
    state = scenes.generator.get_state()
    first = scenes.pictures(4)
    scenes.generator.set_state(state)
    again = scenes.pictures(4)
    assert first.captions == again.captions
    assert torch.equal(first.pixels, again.pixels)


def test_a_missing_font_names_the_package() -> None:
    with pytest.raises(SystemExit, match="fonts-noto-color-emoji"):
        load_sprites(Path("/nowhere.ttf"))

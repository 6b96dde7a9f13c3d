"""Clips for VBench: names that it takes the prompts from, frames and rate as they were, written once."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from training.evaluation.methods import Method
from training.evaluation.vbench import clip_names, write_clip, write_clips


class Samples:
    """In the place of an evaluation: grey clips, each of its own shade."""

    def __init__(self, prompts: Sequence[str], name: str) -> None:
        self.examples, self.seeds, self.name = [SimpleNamespace(prompt=p) for p in prompts], 2, name
        self.made: list[int] = []

    def source(self, method: Method) -> str:
        return f"{self.name} {method.name}"

    def decoded(self, method: Method, indices: Sequence[int]) -> Any:
        for i in indices:
            self.made.append(i)
            yield i, torch.full((3, 3, 16, 32), i / 10)


def frames(path: Path) -> tuple[float, np.ndarray]:
    """Rate and frames of a clip, red first."""
    video = cv2.VideoCapture(str(path))
    found = []
    while (read := video.read())[0]:
        found.append(read[1][..., ::-1])
    return video.get(cv2.CAP_PROP_FPS), np.stack(found)


def moving() -> Tensor:
    """A red square that moves to the right over a smooth green ground."""
    clip = torch.zeros(5, 3, 64, 96)
    clip[:, 1] = torch.linspace(0.2, 0.6, 96)
    for i in range(5):
        clip[i, 0, 20:44, 10 + 8 * i : 34 + 8 * i] = 1
    return clip


def test_a_clip_is_read_back_as_it_was(tmp_path: Path) -> None:
    write_clip(tmp_path / "a panda-0.mp4", moving(), 24)
    rate, found = frames(tmp_path / "a panda-0.mp4")
    assert rate == 24 and found.shape == (5, 64, 96, 3)
    error = np.abs(found / 255 - moving().permute(0, 2, 3, 1).numpy()).mean()
    assert error < 0.03
    assert [path.name for path in tmp_path.iterdir()] == ["a panda-0.mp4"]


def test_a_clip_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="could not be written"):
        write_clip(tmp_path / "none" / "a-0.mp4", moving(), 24)


def test_names_say_the_prompt_as_vbench_reads_it() -> None:
    prompts = ["a panda", "a cat, 8-bit", "black/white", "x" * 300 + "1", "x" * 300 + "2", "a panda", ".hidden"]
    names = clip_names(prompts, 2)
    assert [prompt for _, prompt in names[::2]] == prompts
    files = [name for name, _ in names]
    assert len({name.casefold() for name in files}) == len(files), "each sample has a file of its own"
    assert files[:4] == ["a panda-0.mp4", "a panda-1.mp4", "a cat, 8-bit-0.mp4", "a cat, 8-bit-1.mp4"]
    assert files[10:12] == ["a panda-2.mp4", "a panda-3.mp4"], "the same prompt with another image"
    assert all("/" not in name and len(name.encode()) < 240 and not name.startswith(".") for name in files)
    read = [re.sub(r"-\d+$", "", name.removesuffix(".mp4")) for name in files]  # VBench's get_prompt_from_filename
    assert read[:4] == ["a panda"] * 2 + ["a cat, 8-bit"] * 2


def test_clips_are_written_once_and_again_for_other_samples(tmp_path: Path) -> None:
    methods = [Method("teacher, 40 steps"), Method("a/b")]
    first = Samples(["a panda", "black/white"], "first")
    write_clips(tmp_path, first, methods, 16)  # type: ignore[arg-type]
    assert first.made == [0, 1, 2, 3] * 2
    for folder in ("teacher_40_steps", "a_b"):
        prompts = json.loads((tmp_path / f"{folder}.json").read_text(encoding="utf-8"))
        assert set(prompts) == {path.name for path in (tmp_path / folder).iterdir()}
        assert sorted(prompts.values()) == ["a panda"] * 2 + ["black/white"] * 2
        assert frames(tmp_path / folder / "a panda-1.mp4")[1].mean() == pytest.approx(25.5, abs=3)

    (tmp_path / "a_b" / "a panda-1.mp4").unlink()
    again = Samples(["a panda", "black/white"], "first")
    write_clips(tmp_path, again, methods, 16)  # type: ignore[arg-type]
    assert again.made == [1], "what is there stays"
    other = Samples(["a fox"], "other")
    write_clips(tmp_path, other, methods, 16)  # type: ignore[arg-type]
    assert other.made == [0, 1] * 2
    assert {path.name for path in (tmp_path / "a_b").iterdir()} == {"a fox-0.mp4", "a fox-1.mp4"}

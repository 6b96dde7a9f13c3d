"""Clips in the folders that VBench reads, so that its own tools score the methods of a report.

A folder a method with ``PROMPT-INDEX.mp4``, VBench's own names; beside it ``METHOD.json``, which VBench takes as
``--prompt_file``: file name to prompt, for prompts that cannot be a file's name as they are. Source: VBench, arXiv
2311.17982, and its package on PyPI.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pdmd_core.hashing import digest_of
from training.evaluation.evaluation import Evaluation
from training.evaluation.methods import Method

_LONGEST = 200
"""Bytes of a prompt in a file name; file systems take 255 with index and suffix."""


def write_clips(folder: Path, evaluation: Evaluation, methods: Sequence[Method], rate: float) -> None:
    """Write the samples of methods, which must be in the cache; those that are written already are left as they are.

    Args:
        folder: Where a folder for each method goes.
        evaluation: Prompts, seeds and samples.
        methods: What sampled.
        rate: Frames a second. VBench's dynamic degree looks at 8 frames a second, so it depends on this.

    Raises:
        OSError: When a clip cannot be written.
    """
    clips = clip_names([example.prompt for example in evaluation.examples], evaluation.seeds)
    for method, name in zip(methods, _folder_names([method.name for method in methods]), strict=True):
        where = folder / name
        where.mkdir(parents=True, exist_ok=True)
        source, made = digest_of(1, evaluation.source(method), rate), folder / f"{name}.made"
        if not made.is_file() or made.read_text(encoding="utf-8") != source:  # clips of other samples are made anew
            for old in where.glob("*.mp4"):
                old.unlink()
            made.write_text(source, encoding="utf-8")
        missing = [i for i, (clip, _) in enumerate(clips) if not (where / clip).is_file()]
        for i, pixels in evaluation.decoded(method, missing):
            write_clip(where / clips[i][0], pixels, rate)
        prompts = json.dumps(dict(clips), ensure_ascii=False, indent=2) + "\n"
        (folder / f"{name}.json").write_text(prompts, encoding="utf-8")


def clip_names(prompts: Sequence[str], seeds: int) -> list[tuple[str, str]]:
    """Name the clips as VBench does: the prompt, a hyphen, the index of the sample.

    Args:
        prompts: The prompts; one that is there again, with another image, goes on counting.
        seeds: The number of samples of each prompt.

    Returns:
        File name and prompt of each sample, prompt by prompt. What a file system does not take is left out of the name,
        and a digest tells such prompts apart.
    """
    counts: dict[str, int] = {}
    names = []
    for prompt in prompts:
        stem = _file_name(prompt)
        for _ in range(seeds):
            index = counts.get(stem, 0)
            counts[stem] = index + 1
            names.append((f"{stem}-{index}.mp4", prompt))
    return names


def _file_name(prompt: str) -> str:
    """The prompt itself wherever it can be a name."""
    forbidden = r'[\x00-\x1f<>:"/\\|?*]' if os.name == "nt" else r"[\x00-\x1f/]"
    name = re.sub(forbidden, " ", prompt).encode()[:_LONGEST].decode(errors="ignore").strip()
    if name.startswith("."):
        name = name.lstrip(".") or "prompt"
    return name if name == prompt else f"{name} {digest_of(prompt)[:8]}"


def _folder_names(methods: Sequence[str]) -> list[str]:
    """Names without blanks, which commands take as they are; different ones for different methods."""
    names: list[str] = []
    for method in methods:
        name = re.sub(r"[^\w.-]+", "_", method).strip("_.") or "method"
        names.append(name if name not in names else f"{name}_{digest_of(method)[:8]}")
    return names


def write_clip(path: Path, pixels: Tensor, rate: float) -> None:
    """Write a clip as MPEG-4, complete or not at all.

    Args:
        path: The file, whose name ends in ``.mp4``.
        pixels: Of shape (frames, 3, height, width), in [0, 1].
        rate: Frames a second.

    Raises:
        OSError: When it cannot be written.
    """
    import cv2

    frames = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).flip(1).permute(0, 2, 3, 1).contiguous().numpy()
    part = path.with_name(f"{digest_of(path.name)[:16]}.part.mp4")
    writer = cv2.VideoWriter(str(part), cv2.VideoWriter.fourcc(*"mp4v"), rate, (frames.shape[2], frames.shape[1]))
    try:
        for frame in frames:  # blue first, as OpenCV has it
            writer.write(frame)
    finally:
        writer.release()
    if not part.is_file() or part.stat().st_size == 0:
        raise OSError(f"{path}: the clip could not be written; is there room, and may this folder be written to?")
    part.replace(path)

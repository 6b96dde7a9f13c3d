"""Real pictures or clips in a folder, brought to the size of samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence
from torch import Tensor

from training.config.command_line import UserError
from training.data.buckets import SampleSize

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CLIPS = (".gif", ".mp4", ".webm", ".mov", ".mkv", ".avi")


def data_files(folder: Path, size: SampleSize) -> list[Path]:
    """List the files in a folder and below it that hold pictures, or clips for samples of several frames.

    Args:
        folder: The folder.
        size: Of the samples.

    Raises:
        UserError: When there is no such folder, or not enough in it.
    """
    kinds = CLIPS if size.frames > 1 else PICTURES
    if not folder.is_dir():
        found = f"the file {folder}" if folder.exists() else f"no {folder}"
        raise UserError(f"--data: expected a folder of {'clips' if size.frames > 1 else 'pictures'}, found {found}")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds)
    if len(files) < 2:
        raise UserError(f"--data: expected at least 2 files of {', '.join(kinds)} in {folder}, found {len(files)}")
    return files


def read_sample(path: Path, size: SampleSize) -> Tensor:
    """Read a file, cut around the middle.

    Args:
        path: A picture or a clip, of which the first frames are read.
        size: Of the samples.

    Returns:
        Pixels in [0, 1] of shape (frames, 3, height, width).

    Raises:
        UserError: When it cannot be read, or is shorter than a sample.
    """
    frames = []
    try:
        for image in _frames(path):
            fitted = ImageOps.fit(image.convert("RGB"), (size.width, size.height))
            frames.append(torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1) / 255)
            if len(frames) == size.frames:
                return torch.stack(frames)
    except ImportError:
        raise UserError(f'--data: reading {path} takes OpenCV: pip install "phased-dmd[metrics]"') from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
        reason = " ".join(str(error).split())
        raise UserError(f"--data: cannot read {path} ({reason}): take it out of the folder") from None
    raise UserError(
        f"--data: {path} has {len(frames)} frames, expected at least {size.frames}: take it out of the folder"
    )


def _frames(path: Path) -> Iterator[Image.Image]:
    if path.suffix.lower() in PICTURES:
        with Image.open(path) as image:
            yield ImageOps.exif_transpose(image)
        return
    if path.suffix.lower() == ".gif":
        with Image.open(path) as image:
            yield from ImageSequence.Iterator(image)
        return
    import cv2

    video = cv2.VideoCapture(str(path))
    try:
        while True:
            found, frame = video.read()
            if not found:
                return
            yield Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    finally:
        video.release()

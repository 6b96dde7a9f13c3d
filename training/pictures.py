"""Samples as files: grids of pictures, filmstrips and GIFs of clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 2


def to_image(pixels: Tensor) -> Image.Image:
    """(3, height, width) in [0, 1] to an 8-bit picture."""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def grid(pixels: Tensor, columns: int, zoom: int = 1) -> Image.Image:
    """Samples (count, 3, height, width) in rows of ``columns``, on white, each pixel ``zoom`` times as large."""
    count, _, height, width = pixels.shape
    rows = -(-count // columns)
    sheet = torch.ones(3, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP)
    for i, picture in enumerate(pixels):
        y, x = (i // columns) * (height + GAP), (i % columns) * (width + GAP)
        sheet[:, y : y + height, x : x + width] = picture
    image = to_image(sheet)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST) if zoom > 1 else image


def save_samples(path: Path, pixels: Tensor, columns: int, zoom: int = 2) -> list[Path]:
    """Write samples (count, frames, 3, height, width): one PNG grid, for clips an animated GIF of the grid as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [grid(pixels[:, i], columns, zoom) for i in range(pixels.shape[1])]
    written = [path.with_suffix(".png")]
    if len(frames) == 1:
        frames[0].save(written[0])
        return written
    strips = pixels.flatten(0, 1)
    grid(strips, pixels.shape[1], zoom).save(written[0])
    written.append(path.with_suffix(".gif"))
    frames[0].save(written[1], save_all=True, append_images=frames[1:], duration=120, loop=0)
    return written


def labelled_columns(columns: Sequence[tuple[str, Tensor]], rows: Sequence[str], zoom: int = 2) -> Image.Image:
    """Methods side by side, each (title, samples (prompts, seeds, 3, height, width)); prompts are rows."""
    font = ImageFont.load_default(13)
    label_width = 10 + max(int(font.getlength(row)) for row in rows)
    blocks = [grid(samples.flatten(0, 1), samples.shape[1], zoom) for _, samples in columns]
    height = blocks[0].height
    widths = [max(block.width, int(font.getlength(title))) for (title, _), block in zip(columns, blocks, strict=True)]
    sheet = Image.new("RGB", (label_width + sum(widths) + 16 * len(blocks), height + 26), "white")
    draw = ImageDraw.Draw(sheet)
    step = height / len(rows)
    for i, row in enumerate(rows):
        draw.text((4, 24 + step * (i + 0.5)), row, fill="black", font=font, anchor="lm")
    x = label_width
    for (title, _), block, width in zip(columns, blocks, widths, strict=True):
        draw.text((x, 5), title, fill="black", font=font)
        sheet.paste(block, (x, 24))
        x += width + 16
    return sheet


def read_image(path: Path) -> Tensor:
    """A picture file as (3, height, width) in [0, 1]."""
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1) / 255

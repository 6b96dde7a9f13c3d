"""Samples as files: grids of pictures, filmstrips and GIFs of clips."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 2


def to_image(pixels: Tensor) -> Image.Image:
    """Convert pixels in [0, 1] of shape (3, height, width) to an 8-bit picture."""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def grid(pixels: Tensor, columns: int, zoom: int = 1) -> Image.Image:
    """Arrange pictures in rows, on white.

    Args:
        pixels: Pictures in [0, 1] of shape (count, 3, height, width).
        columns: Pictures in a row.
        zoom: How many times as large each pixel is drawn.
    """
    count, _, height, width = pixels.shape
    rows = -(-count // columns)
    sheet = torch.ones(3, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP)
    for i, picture in enumerate(pixels):
        y, x = (i // columns) * (height + GAP), (i % columns) * (width + GAP)
        sheet[:, y : y + height, x : x + width] = picture
    image = to_image(sheet)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST) if zoom > 1 else image


def save_samples(path: Path, pixels: Tensor, columns: int, zoom: int = 2) -> list[Path]:
    """Write samples as one PNG grid, of clips a filmstrip each, and an animated GIF of the grid as well.

    Args:
        path: Where to write; its suffix is replaced.
        pixels: Samples in [0, 1] of shape (count, frames, 3, height, width).
        columns: Samples in a row of the grid.
        zoom: How many times as large each pixel is drawn.

    Returns:
        What was written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [grid(pixels[:, i], columns, zoom) for i in range(pixels.shape[1])]
    written = [path.with_suffix(".png")]
    if len(frames) == 1:
        frames[0].save(written[0])
        return written
    strips = pixels.flatten(0, 1)
    grid(strips, pixels.shape[1], zoom).save(written[0])
    written.append(path.with_suffix(".gif"))
    animation(written[1], frames)
    return written


def labelled_columns(
    columns: Sequence[tuple[str, Tensor]], rows: Sequence[str], zoom: int = 2, heading: str | None = None
) -> Image.Image:
    """Put methods side by side, with a label for each row.

    Rows are prompts and columns seeds, or rows seeds and columns the frames of a clip.

    Args:
        columns: Title and samples in [0, 1] of shape (rows, columns, 3, height, width) of each method.
        rows: The labels.
        zoom: How many times as large each pixel is drawn.
        heading: A line over all.
    """
    font = ImageFont.load_default(13)
    blocks = [grid(samples.flatten(0, 1), samples.shape[1], zoom) for _, samples in columns]
    height = blocks[0].height
    step = height / len(rows)
    labels = [_wrapped(row, int(step / 17)) for row in rows]
    label_width = 10 + max(int(font.getlength(line)) for label in labels for line in label.splitlines())
    widths = [max(block.width, int(font.getlength(title))) for (title, _), block in zip(columns, blocks, strict=True)]
    width, top = label_width + sum(widths) + 16 * len(blocks), 24 if heading is None else 46
    sheet = Image.new("RGB", (width, top + height + 2), "white")
    draw = ImageDraw.Draw(sheet)
    if heading is not None:
        while font.getlength(heading) > width - 8 and len(heading) > 4:
            heading = heading[:-4].rstrip() + "..."
        draw.text((4, 5), heading, fill="black", font=font)
    for i, label in enumerate(labels):
        draw.multiline_text((4, top + step * (i + 0.5)), label, fill="black", font=font, anchor="lm")
    x = label_width
    for (title, _), block, width in zip(columns, blocks, widths, strict=True):
        draw.text((x, top - 19), title, fill="black", font=font)
        sheet.paste(block, (x, top))
        x += width + 16
    return sheet


def _wrapped(text: str, lines: int) -> str:
    """At most so many lines of 40 letters, and one at least."""
    return "\n".join(textwrap.wrap(text, 40, max_lines=max(1, lines), placeholder=" ...") or [" "])


def animation(path: Path, frames: Sequence[Image.Image]) -> None:
    """Write pictures as an animated GIF, eight frames a second."""
    frames[0].save(path, save_all=True, append_images=list(frames[1:]), duration=120, loop=0)

"""The image of an example."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

from training.data.examples import Example, PromptError


def image_size(example: Example) -> tuple[int, int]:
    """Width and height as it is meant to be seen. Raises PromptError."""
    with _opened(example, example.image) as image:
        turned = image.getexif().get(0x0112, 1) >= 5  # as a camera held upright writes it
        return (image.height, image.width) if turned else image.size


def open_image(example: Example, width: int, height: int, last: bool = False) -> Image.Image:
    """The image (or last) in this size; one of another aspect ratio is cut around its middle. Raises PromptError."""
    with _opened(example, example.last_image if last else example.image) as image:
        return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (width, height))


@contextmanager
def _opened(example: Example, content: Path | bytes | None) -> Iterator[Image.Image]:
    if content is None:
        raise ValueError(f"an example with an image, found {example!r}")
    try:
        with Image.open(BytesIO(content) if isinstance(content, bytes) else content) as image:
            yield image
    except OSError as error:
        name = content if isinstance(content, Path) else f"the image of {example.prompt[:60]!r}"
        raise PromptError(f"{name}: not a readable image ({error})") from None

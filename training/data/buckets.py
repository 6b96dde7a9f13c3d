"""Sizes of training samples: a batch is of one bucket, and examples go to the buckets that suit them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pdmd_core.checks import check_number
from training.data.examples import Example, PromptError
from training.data.images import image_size


@dataclass(frozen=True)
class Bucket:
    """A size of training samples.

    Raises:
        ValueError: A value cannot be; one line that starts with its name.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    frames: int = 1
    """Frames; 1 for pictures."""
    share: float | None = None
    """How often it is drawn, relative to the others; as often as it has examples if null."""

    def __post_init__(self) -> None:
        for name in ("width", "height", "frames"):
            check_number(name, getattr(self, name), at_least=1, whole=True)
        if self.share is not None:
            check_number("share", self.share, above=0)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}" + (f", {self.frames} frames" if self.frames > 1 else "")


@dataclass(frozen=True)
class SampleSize:
    """Pixels, frames and the length to which prompts are padded."""

    height: int
    width: int
    frames: int
    max_sequence_length: int


ANY = -1
"""The bucket of an example that suits all of them: a prompt without an image and without a size."""


def bucket_of(example: Example, buckets: Sequence[Bucket]) -> int:
    """Where an example belongs: the bucket of the nearest aspect ratio, among equals that of the nearest frames.

    Args:
        example: Its aspect ratio is that of the size that it asks for, or else of its image.
        buckets: The sizes of samples.

    Returns:
        The number of a bucket; ``ANY`` for an example with neither size nor image.
    """
    if example.size is None and example.image is None:
        return ANY
    if len(buckets) == 1:
        return 0
    width, height, frames = example.size or (*image_size(example), None)
    wanted = math.log(width / height)

    def distance(bucket: Bucket) -> tuple[float, int]:
        return abs(math.log(bucket.width / bucket.height) - wanted), abs(bucket.frames - (frames or bucket.frames))

    return min(range(len(buckets)), key=lambda i: distance(buckets[i]))


def buckets_in(examples: Iterable[Example], frames: int) -> list[Bucket]:
    """The distinct sizes that examples ask for, in order.

    Args:
        examples: The examples.
        frames: Frames where an example does not say.

    Raises:
        PromptError: An example asks for no size.
    """
    found: dict[Bucket, None] = {}
    for number, example in enumerate(examples, 1):
        if example.size is None:
            raise PromptError(
                f"example {number} ({example.prompt[:40]!r}) has no width and height; data.buckets: columns needs them "
                "for every example, or list the buckets there"
            )
        width, height, own = example.size
        found.setdefault(Bucket(width, height, own or frames))
    return list(found)

"""Sizes of training samples: a batch is of one bucket, and examples go to the buckets that suit them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from training.data.examples import Example, PromptError
from training.data.images import image_size


@dataclass(frozen=True)
class Bucket:
    """Samples of one size in pixels and frames. share: how often it is drawn, relative to the others."""

    width: int
    height: int
    frames: int
    share: float | None = None

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

    The aspect ratio is that of the size that the example asks for, or else of its image; ``ANY`` for one with neither.
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
    """The distinct sizes that examples ask for, in order; ``frames`` where they do not say. Raises PromptError."""
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

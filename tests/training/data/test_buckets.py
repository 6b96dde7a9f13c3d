"""Which bucket an example goes to."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from training.data.buckets import ANY, Bucket, bucket_of, buckets_in
from training.data.examples import Example, PromptError

WIDE, SQUARE, HIGH = Bucket(832, 480, 81), Bucket(640, 640, 81), Bucket(480, 832, 81)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1920, 1080, None), 0), ((1000, 1001, None), 1), ((100, 1000, None), 2), ((721, 640, 5), 1), ((900, 640, 1), 0)],
)
def test_the_nearest_aspect_ratio_decides(size: tuple[int, int, int | None], expected: int) -> None:
    assert bucket_of(Example("x", size=size), [WIDE, SQUARE, HIGH]) == expected


def test_a_ratio_and_its_inverse_are_equally_far_from_one() -> None:
    """In pixels 2:1 would be further from a square than 1:2."""
    buckets = [Bucket(100, 100, 1), Bucket(400, 100, 1), Bucket(100, 400, 1)]
    assert bucket_of(Example("x", size=(190, 100, None)), buckets) == 0
    assert bucket_of(Example("x", size=(100, 190, None)), buckets) == 0
    assert bucket_of(Example("x", size=(100, 210, None)), buckets) == 2


def test_among_equal_shapes_the_nearest_length_decides() -> None:
    buckets = [Bucket(832, 480, 81), Bucket(832, 480, 1), Bucket(1664, 960, 33)]
    assert [bucket_of(Example("x", size=(16, 9, f)), buckets) for f in (81, 1, 30, None)] == [0, 1, 2, 0]


def test_an_image_has_the_shape_it_is_seen_in(tmp_path: Path) -> None:
    Image.new("RGB", (80, 40)).save(tmp_path / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (80, 40)).save(tmp_path / "turned.jpg", exif=exif)
    stream = BytesIO()
    Image.new("RGB", (40, 80)).save(stream, "png")
    images = [tmp_path / "wide.png", tmp_path / "turned.jpg", stream.getvalue()]
    assert [bucket_of(Example("x", image), [WIDE, HIGH]) for image in images] == [0, 1, 1]
    (tmp_path / "none.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(PromptError, match=r"none\.png.*not a readable image"):
        bucket_of(Example("x", tmp_path / "none.png"), [WIDE, HIGH])


def test_a_prompt_alone_suits_every_bucket() -> None:
    assert bucket_of(Example("x"), [WIDE, HIGH]) == ANY


def test_sizes_in_columns_are_buckets_in_their_order() -> None:
    examples = [Example("x", size=size) for size in ((32, 16, 5), (16, 32, None), (32, 16, 5))]
    assert buckets_in(examples, 9) == [Bucket(32, 16, 5), Bucket(16, 32, 9)]
    with pytest.raises(PromptError, match=r"example 2 .*has no width and height"):
        buckets_in([examples[0], Example("y")], 9)

"""Decoding where memory is short: whole, then in tiles, then on the CPU, which is said; the pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pdmd_core.families import family
from tests.helpers.tiny import LATENT_CHANNELS, randn, wan_pipeline
from training.memory.decoding import decoded

CPU = torch.device("cpu")


@pytest.fixture
def parts() -> list[Tensor]:
    return [randn(1, LATENT_CHANNELS, 1, 8, 8, seed=seed) for seed in range(2)]


def pixels(pipeline: Any, parts: list[Tensor], decoding: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat(list(decoded(family("wan"), pipeline, parts, CPU, decoding)))


def test_every_way_decodes_the_same_latents(parts: list[Tensor]) -> None:
    """Tiles hide nothing here: the autoencoder asks for them above a size."""
    pipeline = wan_pipeline()
    whole = pixels(pipeline, parts, "whole")
    assert whole.shape[0] == 2 and whole.shape[2] == 3
    assert torch.equal(pixels(pipeline, parts, "cpu"), whole)
    pipeline.vae.tile_sample_min_height = pipeline.vae.tile_sample_min_width = 32
    pipeline.vae.tile_sample_stride_height = pipeline.vae.tile_sample_stride_width = 24
    tiled = pixels(pipeline, parts, "tiled")
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    assert not pipeline.vae.use_tiling and torch.equal(pixels(pipeline, parts, "auto"), whole)


@pytest.mark.parametrize(
    ("fail", "tried", "words"),
    [
        (1, ["whole", "tiles", "tiles"], ["it goes on in tiles"]),
        (2, ["whole", "tiles", "whole", "whole"], ["it goes on in tiles", "it goes on on the CPU"]),
    ],
)
def test_what_does_not_fit_is_decoded_otherwise_from_there_on(
    parts: list[Tensor], fail: int, tried: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline, seen = wan_pipeline(), list[str]()
    decode = pipeline.vae.decode

    def short(*arguments: Any, **named: Any) -> Any:
        seen.append("tiles" if pipeline.vae.use_tiling else "whole")
        if len(seen) <= fail:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(*arguments, **named)

    pipeline.vae.decode = short
    expected = pixels(wan_pipeline(), parts, "whole")
    torch.testing.assert_close(pixels(pipeline, parts, "auto"), expected)
    assert seen == tried
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True))
    seen.clear()
    with pytest.raises(torch.OutOfMemoryError):
        pixels(pipeline, parts, "whole")

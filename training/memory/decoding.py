"""Decoding latents where memory is short: whole on the device, in tiles, or on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from pdmd_core.families import ModelFamily

Decoding = Literal["auto", "whole", "tiled", "cpu"]
_WAYS: tuple[Decoding, ...] = ("whole", "tiled", "cpu")
_IN_WORDS = {"tiled": "in tiles, whose seams may show", "cpu": "on the CPU, which takes its time"}


def decoded(
    family: ModelFamily,
    pipeline: DiffusionPipeline,
    parts: Iterable[Tensor],
    device: torch.device,
    decoding: Decoding = "auto",
) -> Iterator[Tensor]:
    """Decode latents part by part with a pipeline's autoencoder, which stays where it decoded last.

    Args:
        family: The model family of the pipeline.
        pipeline: A pipeline with its autoencoder.
        parts: Latents of shape (batch, *latent_shape), as many as are decoded at once.
        device: Where the autoencoder decodes if it can.
        decoding: ``whole``, ``tiled`` or ``cpu``; ``auto`` is the first of them for which there is memory, and says
            what it leaves out.

    Yields:
        Pixels in [0, 1] of each part on the CPU, of shape (batch, frames, 3, height, width).

    Raises:
        torch.OutOfMemoryError: If there is no memory for the way that was chosen.
    """
    ways = list(_WAYS if decoding == "auto" else [decoding])
    for part in parts:
        while True:
            try:
                yield _decoded(family, pipeline, part, device, ways[0])
                break
            except torch.OutOfMemoryError:
                if len(ways) == 1:
                    raise
                del ways[0]
            _free()
            print(f"warning: no memory to decode on {device}: it goes on {_IN_WORDS[ways[0]]}", file=sys.stderr)


def _decoded(
    family: ModelFamily, pipeline: DiffusionPipeline, latents: Tensor, device: torch.device, way: Decoding
) -> Tensor:
    autoencoder: Any = pipeline.vae
    place = torch.device("cpu") if way == "cpu" else device
    autoencoder.to(place)
    if way != "tiled":
        return family.decode(pipeline, latents.to(place)).cpu()
    autoencoder.enable_tiling()
    try:
        return family.decode(pipeline, latents.to(place)).cpu()
    finally:
        autoencoder.disable_tiling()


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

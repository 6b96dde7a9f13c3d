"""What models of pictures have in common whose networks take patches of 2 x 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def picture_latent_size(
    title: str, pipeline: DiffusionPipeline, height: int, width: int, frames: int
) -> tuple[int, int]:
    """Tell the size of the latents of a picture.

    Args:
        title: What the model is called in messages.
        pipeline: A pipeline with ``vae_scale_factor``.
        height: Height of the picture in pixels.
        width: Width of the picture in pixels.
        frames: 1.

    Returns:
        Height and width.

    Raises:
        ValueError: If the model has no such size, or it is that of a clip.
    """
    factor = pipeline.vae_scale_factor
    side = 2 * factor
    if height % side or width % side or height < side or width < side:
        raise ValueError(f"{title} pictures have sides that are multiples of {side}, found {width}x{height}")
    if frames != 1:
        raise ValueError(f"{title} makes pictures, 1 frame, found {frames}")
    return height // factor, width // factor

"""What models of pictures have in common whose networks take patches of 2 x 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline


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


def to_tokens(x: Tensor) -> Tensor:
    """Pack latents into a token for each 2 x 2 of them.

    Args:
        x: Latents of shape (batch, channels, height, width).

    Returns:
        Tokens of shape (batch, height / 2 * width / 2, 4 * channels).
    """
    return functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack latents, the inverse of ``to_tokens``.

    Args:
        tokens: Of shape (batch, height / 2 * width / 2, 4 * channels).
        shape: The shape of the latents.

    Returns:
        Latents of this shape.
    """
    return functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (shape[-2] // 2, shape[-1] // 2)), 2)


def decode_pictures(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decode latents of an autoencoder that has a scale and a shift.

    Args:
        vae: The autoencoder.
        latents: As the network knows them, of shape (batch, channels, height, width).

    Returns:
        Pixels in [0, 1] of shape (batch, 1, 3, height, width).
    """
    latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    pixels: Tensor = vae.decode(latents, return_dict=False)[0]
    return (pixels.float().unsqueeze(1) / 2 + 0.5).clamp(0, 1)

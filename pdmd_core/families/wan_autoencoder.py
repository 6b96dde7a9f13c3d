"""Wan's autoencoder, which Qwen-Image has too: its statistics, and its weights' names in the original layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan

Value = TypeVar("Value")

_IN_COMFYUI = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_dim": 16, "is_residual": False}
"""Settings that ComfyUI takes for granted."""

_NAMES = [
    (r"quant_conv\.(.+)", r"conv1.\1"),
    (r"post_quant_conv\.(.+)", r"conv2.\1"),
    (r"(encoder|decoder)\.conv_in\.(.+)", r"\1.conv1.\2"),
    (r"(encoder|decoder)\.mid_block\.resnets\.0\.(.+)", r"\1.middle.0.\2"),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)", r"\1.middle.1.\2"),
    (r"(encoder|decoder)\.mid_block\.resnets\.1\.(.+)", r"\1.middle.2.\2"),
    (r"encoder\.down_blocks\.(\d+)\.(.+)", r"encoder.downsamples.\1.\2"),
    (r"(encoder|decoder)\.norm_out\.(.+)", r"\1.head.0.\2"),
    (r"(encoder|decoder)\.conv_out\.(.+)", r"\1.head.2.\2"),
]
_IN_LAYER = [
    (r"norm1\.(.+)", r"residual.0.\1"),
    (r"conv1\.(.+)", r"residual.2.\1"),
    (r"norm2\.(.+)", r"residual.3.\1"),
    (r"conv2\.(.+)", r"residual.6.\1"),
    (r"conv_shortcut\.(.+)", r"shortcut.\1"),
    (r"(.+)", r"\1"),  # resamplers and attention have the same names in both
]
_UP = re.compile(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.+)")
_LAYER = re.compile(r"((?:encoder|decoder)\.(?:middle|downsamples|upsamples)\.\d+)\.(.+)")


def decode(vae: AutoencoderKLWan | AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Decode latents.

    Args:
        vae: The autoencoder.
        latents: As the network knows them, of shape (batch, channels, latent frames, height / 8, width / 8).

    Returns:
        Pixels in [0, 1] of shape (batch, frames, 3, height, width).
    """
    latents = latents.to(vae.device, vae.dtype)
    mean, std = (
        torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    pixels: Tensor = vae.decode(latents * std + mean, return_dict=False)[0]
    return (pixels.float().transpose(1, 2) / 2 + 0.5).clamp(0, 1)


def native_autoencoder(config: Mapping[str, Any], state: Mapping[str, Value]) -> dict[str, Value]:
    """Rename the weights of an autoencoder that ComfyUI loads.

    Args:
        config: Its ``config.json``.
        state: Its weights by their names in diffusers.

    Returns:
        The weights by ComfyUI's names.

    Raises:
        ValueError: If ComfyUI knows no autoencoder of these settings, or of these weights.
    """
    for key, expected in _IN_COMFYUI.items():
        if config.get(key, expected) != expected:
            raise ValueError(f"ComfyUI loads autoencoders with {key} {expected}, found {config[key]}")
    return autoencoder_to_native(state)


def autoencoder_to_native(state: Mapping[str, Value]) -> dict[str, Value]:
    """Rename the weights of an ``AutoencoderKLWan`` of the layout of Wan 2.1.

    Args:
        state: The weights, or anything else, by their names in diffusers.

    Returns:
        The same by their original names.

    Raises:
        ValueError: If a name has no counterpart there.
    """
    matches = [_UP.fullmatch(key) for key in state]
    resnets = 1 + max((int(match[3]) for match in matches if match and match[2] == "resnets"), default=0)
    native: dict[str, Value] = {}
    for (key, value), match in zip(state.items(), matches, strict=True):
        if match:
            # one flat list in the original: the residual blocks of a stage, then its upsampler
            place = int(match[1]) * (resnets + 1) + (resnets if match[2] == "upsamplers" else int(match[3]))
            name = f"decoder.upsamples.{place}.{match[4]}"
        else:
            name = _renamed(key, _NAMES)
        inside = _LAYER.fullmatch(name)
        native[f"{inside[1]}.{_renamed(inside[2], _IN_LAYER)}" if inside else name] = value
    return native


def _renamed(key: str, names: list[tuple[str, str]]) -> str:
    for pattern, name in names:
        match = re.fullmatch(pattern, key)
        if match:
            return match.expand(name)
    raise ValueError(f"{key!r} is not a weight of an AutoencoderKLWan of Wan 2.1")

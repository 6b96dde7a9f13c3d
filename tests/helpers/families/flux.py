"""Tiny random pipelines of FLUX.1."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from tests.helpers.families.case import Case, beside_tokens, thousandth
from tests.helpers.families.parts import autoencoder_kl, clip, quiet, t5, unpacked
from tests.helpers.tiny import tokenizer

CHANNELS = 4


def _parts(guidance_embeds: bool, levels: int = 1) -> dict[str, Any]:
    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    ).eval()
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": autoencoder_kl(CHANNELS, levels),
        "text_encoder": clip(CLIPTextModel),
        "tokenizer": tokenizer(),
        "text_encoder_2": t5(),
        "tokenizer_2": tokenizer(),
        "transformer": network,
    }


def flux(guidance_embeds: bool = True) -> FluxPipeline:
    """Text to image with two text encoders; ``guidance_embeds``: as in dev, not in schnell."""
    return quiet(FluxPipeline(**_parts(guidance_embeds)))


def flux_edit() -> FluxKontextPipeline:
    """Kontext, whose latents' tokens are followed by those of a picture.

    Its call makes about a million pixels whatever it is asked for, so latents are 64 times smaller.
    """
    return quiet(FluxKontextPipeline(**_parts(True, levels=7)))


CASES = {
    "flux": Case(flux, (8, 12, 1), (1, 24, 4 * CHANNELS), thousandth, unpacked=unpacked),
    "flux_edit": Case(
        flux_edit, (896, 1152, 1), (1, 63, 4 * CHANNELS), beside_tokens, unpacked=unpacked, picture_size=(1152, 896)
    ),
}

"""A tiny random pipeline of LTX-Video."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from tests.helpers.families.case import Case
from tests.helpers.families.parts import quiet
from tests.helpers.tiny import tokenizer

CHANNELS = 8


def ltx_video(timestep_conditioning: bool = False) -> LTXPipeline:
    """Text to video; ``timestep_conditioning``: of the decoder, as in newer autoencoders."""
    torch.manual_seed(0)
    network = LTXVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    ).eval()
    vae = AutoencoderKLLTXVideo(
        latent_channels=CHANNELS,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        scaling_factor=1.3,
        timestep_conditioning=timestep_conditioning,
    ).eval()
    vae.latents_mean += 0.1 * torch.arange(CHANNELS)
    vae.latents_std += 0.2 * torch.arange(CHANNELS)
    text = T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return quiet(
        LTXPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae,
            text_encoder=T5EncoderModel(text).eval(),
            tokenizer=tokenizer(),
            transformer=network,
        )
    )


def _unpacked(pipeline: Any, latents: Tensor, size: tuple[int, int, int]) -> Tensor:
    height, width, frames = size
    return pipeline._unpack_latents(latents, 1 + frames // 8, height // 32, width // 32)


CASES = {"ltx_video": Case(ltx_video, (64, 96, 9), (1, 12, CHANNELS), tokens=24, unpacked=_unpacked)}

"""A tiny random pipeline of Stable Diffusion 3.5."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

from tests.helpers.families.case import Case
from tests.helpers.families.parts import autoencoder_kl, clip, quiet, t5
from tests.helpers.tiny import tokenizer


def stable_diffusion_3(**changes: Any) -> StableDiffusion3Pipeline:
    """Text to image with three text encoders; ``changes`` are of the network."""
    torch.manual_seed(0)
    sizes = {"attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32} | changes
    network = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
        **sizes,
    ).eval()
    return quiet(
        StableDiffusion3Pipeline(
            transformer=network,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=autoencoder_kl(4),
            text_encoder=clip(CLIPTextModelWithProjection),
            tokenizer=tokenizer(),
            text_encoder_2=clip(CLIPTextModelWithProjection),
            tokenizer_2=tokenizer(),
            text_encoder_3=t5(),
            tokenizer_3=tokenizer(),
        )
    )


CASES = {"stable_diffusion_3": Case(stable_diffusion_3, (16, 24, 1), (1, 4, 16, 24))}

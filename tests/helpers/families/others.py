"""Tiny random pipelines of diffusers that are of no family of this project."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests.helpers.families.case import Case, plain, thousandth
from tests.helpers.families.parts import quiet
from tests.helpers.tiny import tokenizer


def _clip(kind: type[Any]) -> Any:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=1,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return kind(config).eval()


def _t5() -> Any:
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).eval()


def _autoencoder_kl(channels: int) -> Any:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()


def flux(guidance_embeds: bool = False) -> FluxPipeline:
    """Text to image with two text encoders."""
    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    ).eval()
    return quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=_autoencoder_kl(1),
            text_encoder=_clip(CLIPTextModel),
            tokenizer=tokenizer(),
            text_encoder_2=_t5(),
            tokenizer_2=tokenizer(),
            transformer=network,
        )
    )


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    """Text to image with three text encoders."""
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    ).eval()
    return quiet(
        StableDiffusion3Pipeline(
            transformer=network,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=_autoencoder_kl(4),
            text_encoder=_clip(CLIPTextModelWithProjection),
            tokenizer=tokenizer(),
            text_encoder_2=_clip(CLIPTextModelWithProjection),
            tokenizer_2=tokenizer(),
            text_encoder_3=_t5(),
            tokenizer_3=tokenizer(),
        )
    )


CASES = {
    "flux": Case(flux, (8, 8, 1), (1, 16, 4), thousandth),
    "stable_diffusion_3": Case(
        stable_diffusion_3, (32, 32, 1), (1, 4, 32, 32), plain, no_guidance={"guidance_scale": 1.0}
    ),
}

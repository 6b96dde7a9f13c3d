"""Tiny random pipelines of FLUX.2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from torch import Tensor
from torch.nn import functional
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.helpers.families.case import Case
from tests.helpers.families.parts import quiet, qwen_tokenizer, spread

CHANNELS, FEATURES = 4, 16
TOKENS = 64
"""One for each byte, and the template around a prompt."""
_SIZES = {"hidden_size": FEATURES, "intermediate_size": 8, "head_dim": 8, "vocab_size": 512}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}


def _autoencoder(levels: int) -> AutoencoderKLFlux2:
    """levels: each but the first halves the sides."""
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[4] * levels,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=1,
        mid_block_add_attention=False,
    ).eval()
    vae.bn.running_mean += 0.1 * torch.arange(4 * CHANNELS)
    vae.bn.running_var += 0.2 * torch.arange(4 * CHANNELS)
    return vae


def _network(guidance_embeds: bool) -> Flux2Transformer2DModel:
    torch.manual_seed(0)
    network = Flux2Transformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * FEATURES,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    ).eval()
    spread(network, 0.1)
    return network


def _tokenizer() -> Qwen2Tokenizer:
    """With a template for messages whose contents are lists of parts."""
    built = qwen_tokenizer()
    part = "{% for part in m['content'] %}{{part['text']}}{% endfor %}"
    built.chat_template = f"{{% for m in messages %}}{part}{{% endfor %}}"
    return built


def flux2(levels: int = 1) -> Flux2Pipeline:
    """dev: guidance is an input of the network."""
    torch.manual_seed(0)
    vision = {"model_type": "pixtral", "image_size": 14, "patch_size": 14, "num_hidden_layers": 1}
    vision |= {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    text = {"model_type": "mistral", "num_hidden_layers": 31, **_SIZES, **_HEADS}
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    pipeline = Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_autoencoder(levels),
        text_encoder=encoder.eval(),
        tokenizer=_tokenizer(),
        transformer=_network(guidance_embeds=True),
    )
    return quiet(pipeline)


def flux2_klein(levels: int = 1) -> Flux2KleinPipeline:
    """klein that is not distilled: guided by the empty prompt."""
    torch.manual_seed(0)
    encoder = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=28, **_SIZES, **_HEADS)).eval()
    return quiet(
        Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=_autoencoder(levels),
            text_encoder=encoder,
            tokenizer=qwen_tokenizer(),
            transformer=_network(guidance_embeds=False),
        )
    )


def _unpacked(pipeline: Any, latents: Tensor, size: tuple[int, int, int]) -> Tensor:
    """dev returns tokens, klein what its autoencoder decodes."""
    if latents.ndim == 3:
        side = 2 * pipeline.vae_scale_factor
        return latents.transpose(1, 2).unflatten(2, (size[0] // side, size[1] // side))
    bn = pipeline.vae.bn
    mean, variance = (values.view(1, -1, 1, 1) for values in (bn.running_mean, bn.running_var))
    return (functional.pixel_unshuffle(latents, 2) - mean) / (variance + pipeline.vae.config.batch_norm_eps).sqrt()


_SIZE, _LATENTS = (8, 12, 1), (1, 4 * CHANNELS, 4, 6)
_DEV = Case(flux2, _SIZE, _LATENTS, velocity=None, tokens=512, unpacked=_unpacked, guided=False)
_KLEIN = Case(flux2_klein, _SIZE, _LATENTS, velocity=None, tokens=TOKENS, unpacked=_unpacked)
_EDITS = {"size": (64, 96, 1), "edits": True, "picture_size": (96, 64)}
"""Pictures have sides of 64 pixels or more: the latents are 8 times smaller."""
CASES = {
    "flux2": _DEV,
    "flux2_klein": _KLEIN,
    "flux2_edit": replace(_DEV, build=lambda: flux2(levels=4), **_EDITS),
    "flux2_klein_edit": replace(_KLEIN, build=lambda: flux2_klein(levels=4), decoded_within=5e-5, **_EDITS),
}

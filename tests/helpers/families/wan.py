"""Tiny random pipelines of Wan 2.1 and 2.2."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
)
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from tests.helpers.families.case import Case, plain
from tests.helpers.families.parts import quiet
from tests.helpers.tiny import LATENT_CHANNELS, autoencoder, text_encoder, tokenizer, transformer, wan_pipeline

IMAGE_FEATURES = 20


def _shared() -> dict[str, Any]:
    return {
        "tokenizer": tokenizer(),
        "text_encoder": text_encoder(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
    }


def wan_two_networks() -> WanPipeline:
    """Wan 2.2 text to video, A14B: two networks, high noise at sigma >= 0.875."""
    networks = {"transformer": transformer(0), "transformer_2": transformer(1)}
    return quiet(WanPipeline(**_shared(), **networks, vae=autoencoder(), boundary_ratio=0.875))


def wan_image_two_networks() -> WanImageToVideoPipeline:
    """Wan 2.2 image to video, A14B: two networks, high noise at sigma >= 0.9."""
    channels = 2 * LATENT_CHANNELS + 4
    networks = {
        "transformer": transformer(0, in_channels=channels),
        "transformer_2": transformer(1, in_channels=channels),
    }
    return quiet(WanImageToVideoPipeline(**_shared(), **networks, vae=_spread_autoencoder(), boundary_ratio=0.9))


def wan_image_clip(last: bool = False) -> WanImageToVideoPipeline:
    """Wan 2.1 image to video: one network that also sees CLIP's features of the image; of two with ``last``."""
    torch.manual_seed(0)
    sizes = {"hidden_size": IMAGE_FEATURES, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    beside = {"added_kv_proj_dim": 24, "image_dim": IMAGE_FEATURES, "pos_embed_seq_len": 10 if last else None}
    network = transformer(0, in_channels=2 * LATENT_CHANNELS + 4, **beside)
    return quiet(
        WanImageToVideoPipeline(
            **_shared(),
            transformer=network,
            vae=_spread_autoencoder(),
            image_encoder=CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8)).eval(),
            image_processor=CLIPImageProcessorPil(crop_size=16, size=16),
        )
    )


def wan_5b(kind: type[DiffusionPipeline] = WanPipeline) -> Any:
    """Wan 2.2 TI2V 5B: 48 channels, 16 pixels, a timestep for each token; text or image to video by ``kind``."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3,
        decoder_base_dim=3,
        z_dim=48,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.1] * 48,
        latents_std=[0.7] * 48,
    ).eval()
    network = transformer(0, in_channels=48, out_channels=48)
    return quiet(kind(**_shared(), transformer=network, vae=vae, expand_timesteps=True))


def _spread_autoencoder() -> AutoencoderKLWan:
    """With statistics that are not 0 and 1, so that forgetting them shows."""
    vae = autoencoder()
    vae.register_to_config(latents_mean=[0.1 * i for i in range(LATENT_CHANNELS)])
    vae.register_to_config(latents_std=[1.0 + 0.2 * i for i in range(LATENT_CHANNELS)])
    return vae


def _beside_channels(network: nn.Module, args: Any, kwargs: dict[str, Any], x: Tensor, timestep: Tensor) -> Tensor:
    states = torch.cat([x, kwargs["hidden_states"][:, x.shape[1] :]], dim=1)
    return plain(network, args, kwargs, states, timestep)


def _of_tokens(network: nn.Module, args: Any, kwargs: dict[str, Any], x: Tensor, timestep: Tensor) -> Tensor:
    """Wan 2.2 5B: a timestep for each token."""
    return plain(network, args, kwargs, x, timestep[:, None].expand_as(kwargs["timestep"]))


_SIZE, _LATENTS = (32, 16, 5), (1, LATENT_CHANNELS, 2, 4, 2)
_SIZE_5B, _LATENTS_5B = (32, 64, 5), (1, 48, 2, 2, 4)
CASES = {
    "wan": Case(wan_pipeline, _SIZE, _LATENTS, tokens=12),
    "wan_two": Case(wan_two_networks, _SIZE, _LATENTS, tokens=12),
    "wan_image_to_video": Case(wan_image_clip, _SIZE, _LATENTS, _beside_channels, tokens=12),
    "wan_first_last_image_to_video": Case(
        lambda: wan_image_clip(last=True), _SIZE, _LATENTS, _beside_channels, tokens=12, last_image=True
    ),
    "wan_two_image_to_video": Case(wan_image_two_networks, _SIZE, _LATENTS, _beside_channels, tokens=12),
    "wan_5b": Case(wan_5b, _SIZE_5B, _LATENTS_5B, _of_tokens, tokens=12),
    # the first frame is given: no loop over all of the latents
    "wan_5b_image_to_video": Case(
        lambda: wan_5b(WanImageToVideoPipeline), _SIZE_5B, _LATENTS_5B, velocity=None, tokens=12
    ),
}

"""A tiny random pipeline of Z-Image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

from tests.helpers.families.case import Case
from tests.helpers.families.parts import quiet, qwen_tokenizer


def z_image() -> ZImagePipeline:
    """Text to image: prompts of different lengths in a list, the reversed timestep, the negative velocity."""
    torch.manual_seed(0)
    network = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    ).eval()
    with torch.no_grad():  # made with torch.empty
        network.x_pad_token.zero_()
        network.cap_pad_token.zero_()
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 4],
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    ).eval()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 512}
    text = Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512)
    return quiet(
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=Qwen3Model(text).eval(),
            tokenizer=qwen_tokenizer(),
            transformer=network,
        )
    )


def _reversed(network: nn.Module, args: Any, kwargs: dict[str, Any], x: Tensor, timestep: Tensor) -> Tensor:
    _, _, captions = args
    states = list(x.unsqueeze(2).unbind(0))
    return -torch.stack(network(states, (1000 - timestep) / 1000, captions, **kwargs)[0]).squeeze(2)


CASES = {"z_image": Case(z_image, (32, 48, 1), (1, 16, 16, 24), _reversed)}

"""A tiny random pipeline of diffusers that is of no family of this project."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from tests.helpers.families.case import Case, thousandth
from tests.helpers.families.parts import autoencoder_kl, quiet, spread
from tests.helpers.tiny import text_encoder, tokenizer


def aura_flow() -> AuraFlowPipeline:
    """Text to image; the network is called with latents in first place."""
    torch.manual_seed(0)
    network = AuraFlowTransformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pos_embed_max_size=256,
    ).eval()
    spread(network, 0.1)
    return quiet(
        AuraFlowPipeline(
            transformer=network,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=autoencoder_kl(4),
            text_encoder=text_encoder(),
            tokenizer=tokenizer(),
        )
    )


def _first(network: nn.Module, args: Any, kwargs: dict[str, Any], x: Tensor, timestep: Tensor) -> Tensor:
    return thousandth(network, args[1:], kwargs, x, timestep)


CASES = {
    "aura_flow": Case(aura_flow, (16, 24, 1), (1, 4, 16, 24), _first, no_guidance={"guidance_scale": 1.0}),
}

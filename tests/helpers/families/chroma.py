"""A tiny random pipeline of Chroma."""

from __future__ import annotations

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tests.helpers.families.case import Case, thousandth
from tests.helpers.families.parts import autoencoder_kl, quiet, t5, unpacked
from tests.helpers.tiny import tokenizer

CHANNELS = 4


def chroma() -> ChromaPipeline:
    """Text to image; the mask of the prompt is added to the scores of attention."""
    torch.manual_seed(0)
    network = ChromaTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    ).eval()
    return quiet(
        ChromaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=autoencoder_kl(CHANNELS),
            text_encoder=t5(),
            tokenizer=tokenizer(),
            transformer=network,
        )
    )


CASES = {"chroma": Case(chroma, (8, 12, 1), (1, 24, 4 * CHANNELS), thousandth, tokens=24, unpacked=unpacked)}

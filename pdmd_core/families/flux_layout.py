"""The blocks that FLUX.1 and Chroma have in common: their names, and the positions of their tokens."""

from __future__ import annotations

import torch
from torch import Tensor

TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
    "proj_out",
)
"""All linear layers of both kinds of blocks but the modulation."""
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
OTHER_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
"""The lists of blocks in the original code."""
IN_BLOCK = {name: name for name in (*TARGETS, *(f"attn.norm_{part}" for part in ("q", "k", "added_q", "added_k")))}
"""ComfyUI reads LoRA files under diffusers' names."""
JOINED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
"""Layers of the original code."""
SHARES = {"linear1": (1, 1, 1, 4)}
PREFIX, FLAT_PREFIX = "transformer.", "lora_transformer_"


def grid_positions(x: Tensor, index: int = 0) -> Tensor:
    """Tell the positions of the tokens of a picture.

    Args:
        x: Latents of shape (batch, channels, height, width).
        index: 0 for the sample, 1 for a picture that is given beside it.

    Returns:
        Index, row and column of each token, of shape (height / 2 * width / 2, 3), in float32.
    """
    rows, columns = (torch.arange(side // 2, device=x.device) for side in x.shape[2:])
    return torch.cartesian_prod(torch.tensor([index], device=x.device), rows, columns).float()

"""The blocks that FLUX.1 and Chroma have in common: their names, and the positions of their tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .native_layout import NativeBlocks

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
ATTENTION = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
}
"""Attention's layers of the original code in blocks of two streams."""
_FEED_FORWARD = {
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",)}
NORMS = {"norm.query_norm": ("attn.norm_q",), "norm.key_norm": ("attn.norm_k",)}
"""Attention's norms of the original code in blocks of one stream."""
SCALES = ("query_norm", "key_norm")
SHARES = {"linear1": (1, 1, 1, 4)}
MODULATION = {"img_mod.lin": ("norm1.linear",), "txt_mod.lin": ("norm1_context.linear",)}
_SINGLE_MODULATION = {"modulation.lin": ("norm.linear",)}


def native_blocks(
    double: Mapping[str, tuple[str, ...]], single: Mapping[str, tuple[str, ...]]
) -> tuple[NativeBlocks, ...]:
    """Name both lists of blocks.

    Args:
        double: Modules of a block of two streams: native names to those in diffusers.
        single: Those of a block of one stream.

    Returns:
        The lists.
    """
    return (
        NativeBlocks("transformer_blocks", "double_blocks", double),
        NativeBlocks("single_transformer_blocks", "single_blocks", single),
    )


PLAIN_BLOCKS = native_blocks(ATTENTION | _FEED_FORWARD, _SINGLE | NORMS)
"""Without modulation of their own."""
MODULATED_BLOCKS = native_blocks(ATTENTION | _FEED_FORWARD | MODULATION, _SINGLE | NORMS | _SINGLE_MODULATION)
PREFIX = "transformer."
"""Of LoRA files under diffusers' names, which ComfyUI reads too."""


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

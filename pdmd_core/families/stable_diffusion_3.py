"""Stable Diffusion 3 and 3.5: ``StableDiffusion3Pipeline`` with one ``SD3Transformer2DModel``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..flow import Sigma, of_each_sample
from .base import Conditioning, ModelFamily
from .lora_keys import LoraKeys
from .module_names import ModuleNames
from .native_layout import NativeBlocks, NativeLayout
from .pictures import decode_pictures, picture_latent_size

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SD3Transformer2DModel
    from PIL.Image import Image

_PROJECTIONS = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_TARGETS = (
    *(f"attn.{part}" for part in (*_PROJECTIONS, "to_out.0", *_ADDED, "to_add_out")),
    *(f"attn2.{part}" for part in (*_PROJECTIONS, "to_out.0")),  # of some blocks of 3.5 medium
    *(f"{side}.net.{part}" for side in ("ff", "ff_context") for part in ("0.proj", "2")),
)
_MODULES = {name: name for name in (*_TARGETS, "norm1.linear", "norm1_context.linear")}
_BLOCK = {
    "x_block.attn.qkv": tuple(f"attn.{part}" for part in _PROJECTIONS),
    "context_block.attn.qkv": tuple(f"attn.{part}" for part in _ADDED),
    "x_block.attn2.qkv": tuple(f"attn2.{part}" for part in _PROJECTIONS),
    "x_block.attn.proj": ("attn.to_out.0",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    **{f"x_block.{attn}.ln_{part}": (f"{attn}.norm_{part}",) for attn in ("attn", "attn2") for part in "qk"},
    **{f"context_block.attn.ln_{part}": (f"attn.norm_added_{part}",) for part in "qk"},
}
"""Layers of the original code."""
_LAYOUT = NativeLayout(
    (NativeBlocks("transformer_blocks", "joint_blocks", _BLOCK),),
    {
        "x_embedder.proj": "pos_embed.proj",
        "context_embedder": "context_embedder",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        **{
            f"{native}_embedder.mlp.{2 * n - 2}": f"time_text_embed.{own}_embedder.linear_{n}"
            for own, native in (("timestep", "t"), ("text", "y"))
            for n in (1, 2)
        },
    },
    {"pos_embed": "pos_embed.pos_embed"},
    swapped=("norm_out.linear",),
    swapped_in_last=("norm1_context.linear",),
)


class StableDiffusion3Family(ModelFamily):
    """Timesteps are ``sigma * 1000``; latents are (channels, height / 8, width / 8).

    Prompts are the tokens of CLIP, then ``max_sequence_length`` of T5. ComfyUI and diffusers read LoRA files under
    diffusers' names; the original code has attention's projections in one weight.
    """

    name = "stable_diffusion_3"
    title = "Stable Diffusion 3"
    architecture = "SD3Transformer2DModel"
    blocks = ("transformer_blocks",)
    modules = _MODULES
    lora_targets = _TARGETS
    lora_keys = LoraKeys(prefix="transformer.", down=".lora_A.weight", up=".lora_B.weight", alpha=None)
    lora_names = ModuleNames(layout=_LAYOUT)
    native_layout = _LAYOUT
    default_base = "stabilityai/stable-diffusion-3.5-medium"

    def latent_shape(self, pipeline: DiffusionPipeline, height: int, width: int, frames: int) -> tuple[int, ...]:
        size = picture_latent_size(self.title, pipeline, height, width, frames)
        return pipeline.transformer.config.in_channels, *size

    def velocity(self, network: nn.Module, x: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        # What `network.dtype` is, which looks through all modules.
        dtype = cast("SD3Transformer2DModel", network).context_embedder.weight.dtype
        velocity: Tensor = network(
            hidden_states=x.to(dtype),
            timestep=of_each_sample(sigma, x) * 1000,
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            pooled_projections=conditioning["pooled_prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]
        return velocity

    @torch.no_grad()
    def encode_prompts(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        max_sequence_length: int,
        images: Sequence[Image] | None = None,
    ) -> dict[str, Tensor]:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), None, None, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def conditioning_shapes(
        self, config: Mapping[str, Any], tokens: int, latent: Sequence[int]
    ) -> dict[str, tuple[int, ...]]:
        return {
            "prompt_embeds": (tokens, config["joint_attention_dim"]),
            "pooled_prompt_embeds": (config["pooled_projection_dim"],),
        }

    @torch.no_grad()
    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        return decode_pictures(pipeline.vae, latents)

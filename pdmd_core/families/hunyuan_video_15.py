"""HunyuanVideo 1.5: its pipelines from texts and from pictures, with one ``HunyuanVideo15Transformer3DModel``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..flow import Sigma, of_each_sample
from .base import Conditioning, ModelFamily
from .flux_layout import ATTENTION, MODULATION, SCALES
from .lora_keys import LoraKeys
from .module_names import ModuleNames
from .native_layout import NativeBlocks, NativeLayout

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, HunyuanVideo15Transformer3DModel
    from PIL.Image import Image

_TARGETS = (
    *(f"attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{part}" for part in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{side}.{part}" for side in ("ff", "ff_context") for part in ("net.0.proj", "net.2")),
)
_MODULES = {name: name for name in (*_TARGETS, "norm1.linear", "norm1_context.linear")}
_OTHERS = {
    "img_attn_q": ("attn.to_q",),
    "img_attn_k": ("attn.to_k",),
    "img_attn_v": ("attn.to_v",),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_q": ("attn.add_q_proj",),
    "txt_attn_k": ("attn.add_k_proj",),
    "txt_attn_v": ("attn.add_v_proj",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp.fc1": ("ff.net.0.proj",),
    "img_mlp.fc2": ("ff.net.2",),
    "txt_mlp.fc1": ("ff_context.net.0.proj",),
    "txt_mlp.fc2": ("ff_context.net.2",),
    "img_mod.linear": ("norm1.linear",),
    "txt_mod.linear": ("norm1_context.linear",),
}
"""Layers of a block in the original code, where ComfyUI has other names."""
_EMBEDDERS = {
    "x_embedder.proj": "img_in.proj",
    "image_embedder.norm_in": "vision_in.proj.0",
    "image_embedder.linear_1": "vision_in.proj.1",
    "image_embedder.linear_2": "vision_in.proj.3",
    "image_embedder.norm_out": "vision_in.proj.4",
    "context_embedder.proj_in": "txt_in.input_embedder",
    "context_embedder_2.norm": "byt5_in.layernorm",
    **{f"context_embedder_2.linear_{n}": f"byt5_in.fc{n}" for n in (1, 2, 3)},
    "cond_type_embed": "cond_type_embedding",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
_TIME = "context_embedder.time_text_embed"
_PAIRS = (
    (f"{_TIME}.timestep_embedder", "txt_in.t_embedder", "mlp.0", "mlp.2"),
    (f"{_TIME}.text_embedder", "txt_in.c_embedder", "linear_1", "linear_2"),
    ("time_embed.timestep_embedder", "time_in", "mlp.0", "mlp.2"),
    ("time_embed.timestep_embedder_r", "time_r_in", "mlp.0", "mlp.2"),
)
"""Embedders of two layers, which have other names in the original code than in ComfyUI."""
_REFINER = {
    "self_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "self_attn.proj": ("attn.to_out.0",),
    "mlp.0": ("ff.net.0.proj",),
    "mlp.2": ("ff.net.2",),
    "norm1": ("norm1",),
    "norm2": ("norm2",),
    "adaLN_modulation.1": ("norm_out.linear",),
}
_FEED_FORWARD = {
    f"{native}_mlp.{layer}": (f"{own}.net.{part}",)
    for native, own in (("img", "ff"), ("txt", "ff_context"))
    for layer, part in ((0, "0.proj"), (2, "2"))
}
_LAYOUT = NativeLayout(
    (
        NativeBlocks("transformer_blocks", "double_blocks", ATTENTION | MODULATION | _FEED_FORWARD),
        NativeBlocks(
            "context_embedder.token_refiner.refiner_blocks", "txt_in.individual_token_refiner.blocks", _REFINER
        ),
    ),
    {
        **{native: own for own, native in _EMBEDDERS.items()},
        **{f"{native}.in_layer": f"{own}.linear_1" for own, native, *_ in _PAIRS},
        **{f"{native}.out_layer": f"{own}.linear_2" for own, native, *_ in _PAIRS},
    },
    swapped=("norm_out.linear",),
    scales=SCALES,
)
"""The names of ComfyUI."""
_OTHER_OUTSIDE = {
    f"{native}.{layer}": f"{own}.linear_{n}"
    for own, native, *layers in _PAIRS
    for n, layer in zip((1, 2), layers, strict=True)
}
_TOKENS = 1000
"""At which the pipeline's call cuts prompts; it has no argument for it."""
_GLYPH_TOKENS = 256
"""At which quoted parts are cut."""
_IMAGE_TOKENS = 729
"""Of SigLIP at 384 pixels, which the network sees the picture with."""


class HunyuanVideo15Family(ModelFamily):
    """Timesteps are ``sigma * 1000``; latents are (channels, latent frames, height / 16, width / 16).

    Image to video: ``image_latents`` of the picture go beside the first latent frame, with a mask, and its
    ``image_embeds`` before the prompt; all of it is zero from texts alone. Quoted parts of a prompt, which are to be
    read in the clip, go through a second encoder (``glyph_embeds``). Guidance is a component of the pipeline. The
    pipeline has no loader of LoRA files, its network has. ComfyUI has attention's projections in one weight, and its
    own loader reads no LoRA files under diffusers' names.
    """

    name = "hunyuan_video_15"
    title = "HunyuanVideo 1.5"
    architecture = "HunyuanVideo15Transformer3DModel"
    blocks = ("transformer_blocks",)
    modules = _MODULES
    lora_targets = _TARGETS
    lora_keys = LoraKeys(prefix="transformer.", down=".lora_A.weight", up=".lora_B.weight", alpha=None)
    lora_names = ModuleNames(joined=_OTHERS, other_outside=_OTHER_OUTSIDE, layout=_LAYOUT)
    native_layout = _LAYOUT
    lora_loader = "transformer.load_lora_adapter"
    default_base = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v"
    guider = "guider"
    encoders = ("vae",)
    call_lacks = ("callback_on_step_end", "max_sequence_length")
    makes_clips, frame_rate = True, 24.0
    picture_sets_size = True

    def latent_shape(self, pipeline: DiffusionPipeline, height: int, width: int, frames: int) -> tuple[int, ...]:
        spatial, temporal = pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal
        side = spatial * pipeline.transformer.config.patch_size
        if height % side or width % side or height < side or width < side:
            raise ValueError(f"{self.title} clips have sides that are multiples of {side}, found {width}x{height}")
        if frames < 1 or (frames - 1) % temporal:
            raise ValueError(f"{self.title} clips have 1 + a multiple of {temporal} frames, found {frames}")
        if self.takes_image(pipeline):  # the call chooses the size, by the picture's aspect ratio
            chosen = pipeline.video_processor.calculate_default_height_width(height, width, pipeline.target_size)
            if (height, width) != tuple(map(int, chosen)):
                raise ValueError(
                    f"{self.title} makes clips of {chosen[1]}x{chosen[0]} from pictures of this shape, found "
                    f"{width}x{height}"
                )
        channels = pipeline.transformer.config.out_channels
        return channels, 1 + (frames - 1) // temporal, height // spatial, width // spatial

    def velocity(self, network: nn.Module, x: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        hunyuan = cast("HunyuanVideo15Transformer3DModel", network)
        # What `network.dtype` is, which looks through all modules.
        dtype = hunyuan.x_embedder.proj.weight.dtype
        picture = x.new_zeros(len(x), hunyuan.config.in_channels - x.shape[1], *x.shape[2:])
        if (latents := conditioning.get("image_latents")) is not None:
            picture[:, :-1, :1] = latents.to(x.dtype)
            picture[:, -1, 0] = 1
        # one token where there is no picture: the network masks it
        no_embeds = x.new_zeros(len(x), 1, hunyuan.config.image_embed_dim)
        velocity: Tensor = hunyuan(
            hidden_states=torch.cat([x, picture], dim=1).to(dtype),
            # the pipeline rounds timesteps to the dtype of its latents
            timestep=(of_each_sample(sigma, x) * 1000).to(dtype),
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            encoder_attention_mask=conditioning["prompt_mask"].to(x.device, non_blocking=True),
            encoder_hidden_states_2=conditioning["glyph_embeds"].to(dtype),
            encoder_attention_mask_2=conditioning["glyph_mask"],
            image_embeds=conditioning.get("image_embeds", no_embeds).to(dtype),
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
        embeds, mask, glyphs, glyph_mask = pipeline.encode_prompt(list(prompts), batch_size=len(prompts))
        tokens, glyph_tokens = _used(mask), _used(glyph_mask)
        if tokens > max_sequence_length:
            raise ValueError(
                f"a {self.title} prompt has {tokens} tokens, max_sequence_length is {max_sequence_length}: the "
                f"pipeline cuts prompts at {_TOKENS} tokens alone; give {_TOKENS}, or shorter prompts"
            )
        return {
            "prompt_embeds": embeds[:, :tokens],
            "prompt_mask": mask[:, :tokens].long(),
            "glyph_embeds": glyphs[:, :glyph_tokens],
            "glyph_mask": glyph_mask[:, :glyph_tokens].long(),
        }

    def conditioning_shapes(
        self, config: Mapping[str, Any], tokens: int, latent: Sequence[int]
    ) -> dict[str, tuple[int, ...]]:
        return {
            "prompt_embeds": (tokens, config["text_embed_dim"]),
            "prompt_mask": (tokens,),
            "glyph_embeds": (_GLYPH_TOKENS, config["text_embed_2_dim"]),
            "glyph_mask": (_GLYPH_TOKENS,),
        }

    def image_shapes(self, pipeline: DiffusionPipeline, latent: Sequence[int]) -> dict[str, tuple[int, ...]]:
        embeds = (_IMAGE_TOKENS, pipeline.transformer.config.image_embed_dim)
        return {"image_latents": (latent[0], 1, *latent[2:]), "image_embeds": embeds}

    @torch.no_grad()
    def encode_images(
        self, pipeline: DiffusionPipeline, images: Sequence[Image], height: int, width: int, frames: int
    ) -> dict[str, Tensor]:
        processor, device, latents, embeds = pipeline.video_processor, pipeline.vae.device, [], []
        for image in images:
            seen = processor.resize(image, height=height, width=width, resize_mode="crop")
            latents.append(pipeline._get_image_latents(pipeline.vae, processor, seen, height, width, device))
            embeds.append(pipeline.encode_image(seen, 1, device, torch.float32))
        return {"image_latents": torch.cat(latents), "image_embeds": torch.cat(embeds)}

    @torch.no_grad()
    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
        pixels: Tensor = vae.decode(latents, return_dict=False)[0]
        return (pixels.float().transpose(1, 2) / 2 + 0.5).clamp(0, 1)


def _used(mask: Tensor) -> int:
    """Tokens up to the last one that a row of (batch, tokens) has, 1 at least; those after change nothing."""
    used = mask.any(0).nonzero()
    return int(used.max()) + 1 if len(used) else 1

"""LTX-Video: ``LTXPipeline`` with one ``LTXVideoTransformer3DModel``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..flow import Sigma, of_each_sample
from .base import Conditioning, ModelFamily
from .lora_keys import LoraKeys
from .module_names import ModuleNames

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, LTXVideoTransformer3DModel
    from PIL.Image import Image

_TARGETS = (
    *(f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
)
_MODULES = {name: name for name in _TARGETS}
_WEIGHT = re.compile(
    rf"transformer_blocks\.\d+\.(({'|'.join(map(re.escape, _TARGETS))})\.(weight|bias)|attn[12]\.norm_[qk]\.weight"
    r"|scale_shift_table)"
    r"|(proj_in|proj_out|caption_projection\.linear_[12]|time_embed\.linear"
    r"|time_embed\.emb\.timestep_embedder\.linear_[12])\.(weight|bias)"
    r"|scale_shift_table"
)
_NATIVE = {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm", "norm_k": "k_norm"}

_NAMES = ModuleNames(
    blocks=("transformer_blocks",),
    in_block=_MODULES | {f"attn{n}.norm_{part}": f"attn{n}.{part}_norm" for n in (1, 2) for part in "qk"},
    outside={
        "proj_in": "patchify_proj",
        "proj_out": "proj_out",
        "time_embed.linear": "adaln_single.linear",
        "time_embed.emb.timestep_embedder.linear_1": "adaln_single.emb.timestep_embedder.linear_1",
        "time_embed.emb.timestep_embedder.linear_2": "adaln_single.emb.timestep_embedder.linear_2",
        "caption_projection.linear_1": "caption_projection.linear_1",
        "caption_projection.linear_2": "caption_projection.linear_2",
    },
    block_parameters={"scale_shift_table": "scale_shift_table"},
    parameters={"scale_shift_table": "scale_shift_table"},
)

_PIXELS, _FRAMES = 32, 8
"""Of a sample in each direction for one of its latent: a fact of the network too, whose positions are in pixels."""
_FRAME_RATE = 25
"""Frames per second, the default of the pipeline's call: positions in time are in seconds."""


class LtxVideoFamily(ModelFamily):
    """Timesteps are ``sigma * 1000``; latents are (channels, latent frames, height / 32, width / 32), a token each.

    The text encoder sees padding, so prompts have ``max_sequence_length`` tokens; the network does not see it. Clips
    have 25 frames per second. Newer autoencoders take a timestep and noise when they decode: 0 and none here, as in
    the pipeline's call unless ``decode_timestep`` is given.
    """

    name = "ltx_video"
    title = "LTX-Video"
    architecture = "LTXVideoTransformer3DModel"
    blocks = ("transformer_blocks",)
    modules = _MODULES
    lora_targets = _TARGETS
    lora_names = _NAMES
    lora_keys = LoraKeys(down=".lora_A.weight", up=".lora_B.weight", alpha=None)
    makes_clips, frame_rate = True, 25.0
    context_parallel = False  # its attention has a mask for all heads, a process has a part of them
    comfyui_sampling = "ModelSamplingAuraFlow"

    def latent_shape(self, pipeline: DiffusionPipeline, height: int, width: int, frames: int) -> tuple[int, ...]:
        from diffusers import LTXPipeline

        config = pipeline.transformer.config
        ratios = pipeline.vae_spatial_compression_ratio, pipeline.vae_temporal_compression_ratio
        if not isinstance(pipeline, LTXPipeline):
            # the others give the network positions of their own
            raise ValueError(f"LTX-Video is known as an LTXPipeline, found a {type(pipeline).__name__}")
        if ratios != (_PIXELS, _FRAMES) or (config.patch_size, config.patch_size_t) != (1, 1):
            raise ValueError(
                f"LTX-Video has a token for {_PIXELS} pixels and {_FRAMES} frames, found patches of "
                f"{config.patch_size} and {config.patch_size_t} latents of {ratios[0]} pixels and {ratios[1]} frames"
            )
        if height % _PIXELS or width % _PIXELS or height < _PIXELS or width < _PIXELS:
            raise ValueError(f"LTX-Video clips have sides that are multiples of {_PIXELS}, found {width}x{height}")
        if frames < 1 or (frames - 1) % _FRAMES:
            raise ValueError(f"LTX-Video clips have 1 + a multiple of {_FRAMES} frames, found {frames}")
        return config.in_channels, 1 + (frames - 1) // _FRAMES, height // _PIXELS, width // _PIXELS

    def velocity(self, network: nn.Module, x: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        # What `network.dtype` is, which looks through all modules.
        dtype = cast("LTXVideoTransformer3DModel", network).proj_in.weight.dtype
        timestep = of_each_sample(sigma, x) * 1000
        frames, height, width = x.shape[2:]
        tokens: Tensor = network(
            hidden_states=x.flatten(2).transpose(1, 2).to(dtype),
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            timestep=timestep,
            encoder_attention_mask=conditioning["prompt_mask"].to(x.device, non_blocking=True),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(_FRAMES / _FRAME_RATE, _PIXELS, _PIXELS),
            return_dict=False,
        )[0]
        velocity: Tensor = tokens.transpose(1, 2).unflatten(2, (frames, height, width))
        return velocity

    @torch.no_grad()
    def encode_prompts(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        max_sequence_length: int,
        images: Sequence[Image] | None = None,
    ) -> dict[str, Tensor]:
        embeds, mask, *_ = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return {"prompt_embeds": embeds, "prompt_mask": mask.long()}

    def conditioning_shapes(
        self, config: Mapping[str, Any], tokens: int, latent: Sequence[int]
    ) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (tokens, config["caption_channels"]), "prompt_mask": (tokens,)}

    def takes_image(self, pipeline: DiffusionPipeline | type[DiffusionPipeline]) -> bool:
        return False

    @torch.no_grad()
    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        latents = latents.to(vae.device, vae.dtype)
        mean, std = (values.to(latents).view(1, -1, 1, 1, 1) for values in (vae.latents_mean, vae.latents_std))
        timestep = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        pixels: Tensor = vae.decode(latents * std / vae.config.scaling_factor + mean, timestep, return_dict=False)[0]
        return (pixels.float().transpose(1, 2) / 2 + 0.5).clamp(0, 1)

    def native_weight_name(self, diffusers_name: str) -> str:
        if not _WEIGHT.fullmatch(diffusers_name):
            raise ValueError(f"{diffusers_name!r} is not a weight of {self.architecture}")
        return ".".join(_NATIVE.get(part, part) for part in diffusers_name.split("."))

    def comfyui_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        heads, width = config["num_attention_heads"], config["attention_head_dim"]
        true = {
            "in_channels": config["in_channels"],
            "num_attention_heads": heads,
            "attention_head_dim": width,
            "caption_channels": config["caption_channels"],
        }
        guessed = {
            "in_channels": 128,
            "num_attention_heads": 32,
            "attention_head_dim": heads * width // 32,
            "caption_channels": 4096,
        }
        return {key: value for key, value in true.items() if value != guessed[key]}

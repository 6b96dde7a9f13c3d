"""Qwen-Image and Qwen-Image-Edit: ``QwenImagePipeline``, ``QwenImageEditPipeline``, ``QwenImageEditPlusPipeline``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..flow import Sigma, of_each_sample
from . import wan_autoencoder
from .base import Conditioning, ModelFamily
from .guidance import classifier_free_guidance
from .module_names import ModuleNames
from .pictures import from_tokens, picture_latent_size, to_tokens

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, QwenImageTransformer2DModel
    from PIL.Image import Image

_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "img_mlp.net.0.proj",
    "img_mlp.net.2",
    "txt_mlp.net.0.proj",
    "txt_mlp.net.2",
)
_WEIGHT = re.compile(
    r"transformer_blocks\.\d+\.(attn|img_mod|txt_mod|img_mlp|txt_mlp)\..+\.(weight|bias)"
    r"|(img_in|txt_in|txt_norm|proj_out|norm_out\.linear|time_text_embed\.[\w.]+)\.(weight|bias)"
)
_MODULES = {name: name for name in (*_TARGETS, "img_mod.1", "txt_mod.1")}
_NORMS = ("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k")
_OUTSIDE = (
    "img_in",
    "txt_in",
    "txt_norm",
    "proj_out",
    "norm_out.linear",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
)
_LORA = re.compile(r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)[._]")

_REFERENCE = 1024 * 1024
"""Pixels of the image that an edit pipeline encodes."""
_SEEN_BY_PLUS = 384 * 384
"""Pixels of the image that the text encoder sees in ``QwenImageEditPlusPipeline``; elsewhere it sees the reference."""

_TOKEN = 28
"""Sides of the part of an image that is one token of the text encoder."""


class QwenImageFamily(ModelFamily):
    """The network's timestep is sigma; latents are (channels, 1, height / 8, width / 8), packed 2x2 for the network.

    The native layout of the network is diffusers' own. Edit pipelines have ``image_latents`` of one image, whose tokens
    follow those of the sample. ``guidance_scale`` of the pipeline is an input of networks that were distilled for it.
    """

    name = "qwen_image"
    title = "Qwen-Image"
    architecture = "QwenImageTransformer2DModel"
    blocks = ("transformer_blocks",)
    modules = _MODULES
    lora_targets = _TARGETS
    lora_names = ModuleNames(
        blocks=("transformer_blocks",),
        in_block=_MODULES | {name: name for name in _NORMS},
        outside={name: name for name in _OUTSIDE},
    )
    default_base = "Qwen/Qwen-Image"
    guidance_argument = "true_cfg_scale"
    comfyui_sampling = "ModelSamplingAuraFlow"

    def latent_shape(self, pipeline: DiffusionPipeline, height: int, width: int, frames: int) -> tuple[int, ...]:
        size = picture_latent_size(self.title, pipeline, height, width, frames)
        return pipeline.transformer.config.in_channels // 4, 1, *size

    def velocity(self, network: nn.Module, x: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        # What `network.dtype` is, which looks through all modules.
        dtype = cast("QwenImageTransformer2DModel", network).img_in.weight.dtype
        # The pipeline rounds timesteps to the dtype of its latents before it divides.
        timestep = of_each_sample(sigma, x) * 1000
        mask = conditioning["prompt_mask"].bool()
        tokens, shapes = _pack(x), [_grid(x)]
        own = tokens.shape[1]
        if "image_latents" in conditioning:
            image = conditioning["image_latents"]
            tokens, shapes = torch.cat([tokens, _pack(image).to(tokens.dtype)], dim=1), [*shapes, _grid(image)]
        output = network(
            hidden_states=tokens.to(dtype),
            timestep=timestep.to(dtype) / 1000,
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            encoder_hidden_states_mask=None if bool(mask.all()) else mask.to(x.device, non_blocking=True),
            img_shapes=[shapes] * len(x),
            return_dict=False,
        )
        return _unpack(output[0][:, :own], x.shape)

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        # each token keeps the length that it has with the prompt
        guided = _pack(classifier_free_guidance(positive, negative, scale))
        length = _pack(positive).to(guided.dtype).norm(dim=-1, keepdim=True)
        return _unpack(guided * (length / guided.norm(dim=-1, keepdim=True)), positive.shape)

    @torch.no_grad()
    def encode_prompts(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        max_sequence_length: int,
        images: Sequence[Image] | None = None,
    ) -> dict[str, Tensor]:
        length = {"max_sequence_length": max_sequence_length}
        if images is None:
            rows = [pipeline.encode_prompt(list(prompts), **length)]
        elif _is_plus(pipeline):  # several images there are those of one prompt
            seen = [_resized(pipeline, image, _SEEN_BY_PLUS) for image in images]
            rows = [pipeline.encode_prompt(p, [i], **length) for p, i in zip(prompts, seen, strict=True)]
        else:
            rows = [
                pipeline.encode_prompt(list(prompts), [_resized(pipeline, i, _REFERENCE) for i in images], **length)
            ]
        tokens: list[Tensor] = []
        masks: list[Tensor] = []
        for embeds, mask in rows:
            tokens += embeds.unbind()
            masks += torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
        return {"prompt_embeds": pad_sequence(tokens, True), "prompt_mask": pad_sequence(masks, True)}

    def conditioning_shapes(
        self, config: Mapping[str, Any], tokens: int, latent: Sequence[int]
    ) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (tokens, config["joint_attention_dim"]), "prompt_mask": (tokens,)}

    def prompts_see_images(self, pipeline: DiffusionPipeline) -> bool:
        return self.takes_image(pipeline)

    def image_shapes(self, pipeline: DiffusionPipeline, latent: Sequence[int]) -> dict[str, tuple[int, ...]]:
        width, height = _size(_REFERENCE, latent[-1] / latent[-2])
        side = 2 * pipeline.vae_scale_factor
        return {"image_latents": (latent[0], 1, height // side * 2, width // side * 2)}

    def image_tokens(self, pipeline: DiffusionPipeline, latent: Sequence[int]) -> int:
        pixels = _SEEN_BY_PLUS if _is_plus(pipeline) else _REFERENCE
        width, height = _size(pixels, latent[-1] / latent[-2])
        return round(width / _TOKEN) * round(height / _TOKEN)

    @torch.no_grad()
    def encode_images(
        self, pipeline: DiffusionPipeline, images: Sequence[Image], height: int, width: int, frames: int
    ) -> dict[str, Tensor]:
        latents = []
        for image in images:
            resized = _resized(pipeline, image, _REFERENCE)
            pixels = pipeline.image_processor.preprocess(resized, resized.height, resized.width).unsqueeze(2)
            latents.append(pipeline._encode_vae_image(pixels.to(pipeline.vae.device, pipeline.vae.dtype), None))
        return {"image_latents": torch.cat(latents)}

    @torch.no_grad()
    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        return wan_autoencoder.decode(pipeline.vae, latents)

    def owns_lora(self, modules: Sequence[str]) -> bool:
        # attention alone has names that other models have too
        return any(_LORA.search(module) for module in modules)

    def native_weight_name(self, diffusers_name: str) -> str:
        if not _WEIGHT.fullmatch(diffusers_name):
            raise ValueError(f"{diffusers_name!r} is not a weight of {self.architecture}")
        return diffusers_name


def _pack(x: Tensor) -> Tensor:
    """(batch, channels, 1, height, width) to (batch, tokens, 4 * channels): one token for each 2x2 pixels."""
    return to_tokens(x[:, :, 0])


def _unpack(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of ``_pack``, to latents of this shape."""
    return from_tokens(tokens, shape).unsqueeze(2)


def _grid(x: Tensor) -> tuple[int, int, int]:
    return 1, x.shape[3] // 2, x.shape[4] // 2


def _is_plus(pipeline: DiffusionPipeline) -> bool:
    """Whether it is the pipeline of Qwen-Image-Edit-2509 and later."""
    from diffusers import QwenImageEditPlusPipeline

    return isinstance(pipeline, QwenImageEditPlusPipeline)


def _size(pixels: int, ratio: float) -> tuple[int, int]:
    """Width and height to which edit pipelines resize what they are given: about so many pixels, multiples of 32."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions

    width, height, _ = calculate_dimensions(pixels, ratio)
    return int(width), int(height)


def _resized(pipeline: DiffusionPipeline, image: Image, pixels: int) -> Image:
    width, height = _size(pixels, image.width / image.height)
    resized: Image = pipeline.image_processor.resize(image, height, width)
    return resized

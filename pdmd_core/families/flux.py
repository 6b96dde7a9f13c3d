"""FLUX.1: ``FluxPipeline`` (dev, schnell, Krea) and ``FluxKontextPipeline`` with one ``FluxTransformer2DModel``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..flow import Sigma, of_each_sample
from .base import Conditioning, ModelFamily
from .flux_layout import BLOCKS, MODULATED_BLOCKS, PREFIX, SCALES, SHARES, TARGETS, grid_positions
from .guidance import embedded_guidance
from .lora_keys import LoraKeys
from .module_names import ModuleNames
from .native_layout import NativeLayout
from .pictures import decode_pictures, from_tokens, picture_latent_size, to_tokens

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, FluxTransformer2DModel
    from PIL.Image import Image

_MODULES = {name: name for name in (*TARGETS, "norm1.linear", "norm1_context.linear", "norm.linear")}
_EMBEDDERS = {
    f"{native}.{layer}": f"time_text_embed.{own}.linear_{n}"
    for own, native in (
        ("timestep_embedder", "time_in"),
        ("text_embedder", "vector_in"),
        ("guidance_embedder", "guidance_in"),
    )
    for n, layer in ((1, "in_layer"), (2, "out_layer"))
}
_LAYOUT = NativeLayout(
    MODULATED_BLOCKS,
    _EMBEDDERS
    | {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    shares=SHARES,
    swapped=("norm_out.linear",),
    scales=SCALES,
)
_AREA = 1024 * 1024
"""Pixels of the pictures that Kontext's call makes, whatever size it is asked for."""


class FluxFamily(ModelFamily):
    """The network's timestep is sigma; latents are (channels, height / 8, width / 8), packed 2x2 for the network.

    Guidance of FLUX.1 dev and Kontext is an input of the network, 3.5 as in the pipeline's call. Kontext has
    ``image_latents`` of one picture, whose tokens follow those of the sample. ComfyUI and diffusers read LoRA files
    under diffusers' names; the original code has attention's projections in one weight.
    """

    name = "flux"
    title = "FLUX.1"
    architecture = "FluxTransformer2DModel"
    blocks = BLOCKS
    modules = _MODULES
    lora_targets = TARGETS
    lora_keys = LoraKeys(prefix=PREFIX, down=".lora_A.weight", up=".lora_B.weight", alpha=None)
    lora_names = ModuleNames(layout=_LAYOUT)
    native_layout = _LAYOUT
    default_base = "black-forest-labs/FLUX.1-dev"
    guidance_argument = "true_cfg_scale"
    embedded_guidance = 3.5
    context_parallel = False  # diffusers has a plan, which was not compared with one process
    comfyui_sampling = "ModelSamplingAuraFlow"

    def latent_shape(self, pipeline: DiffusionPipeline, height: int, width: int, frames: int) -> tuple[int, ...]:
        from diffusers import FluxKontextPipeline, FluxPipeline

        if not isinstance(pipeline, (FluxPipeline, FluxKontextPipeline)):
            # the others give the network more than it is given here
            raise ValueError(
                f"FLUX.1 is known as a FluxPipeline or FluxKontextPipeline, found a {type(pipeline).__name__}"
            )
        size = picture_latent_size(self.title, pipeline, height, width, frames)
        if isinstance(pipeline, FluxKontextPipeline):
            side = 2 * pipeline.vae_scale_factor
            made = [round((_AREA * ratio) ** 0.5) // side * side for ratio in (width / height, height / width)]
            if made != [width, height]:
                raise ValueError(
                    f"FLUX.1 Kontext makes pictures of about 1024x1024 pixels, {made[0]}x{made[1]} in this shape, "
                    f"found {width}x{height}"
                )
        return pipeline.transformer.config.in_channels // 4, *size

    def velocity(self, network: nn.Module, x: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        # What `network.dtype` is, which looks through all modules.
        dtype = cast("FluxTransformer2DModel", network).x_embedder.weight.dtype
        # The pipeline rounds timesteps to the dtype of its latents before it divides.
        timestep = of_each_sample(sigma, x) * 1000
        tokens, positions, prompts = to_tokens(x), grid_positions(x), conditioning["prompt_embeds"]
        own = tokens.shape[1]
        if "image_latents" in conditioning:
            image = conditioning["image_latents"]
            tokens = torch.cat([tokens, to_tokens(image).to(tokens.dtype)], dim=1)
            positions = torch.cat([positions, grid_positions(image, 1)])
        output: Tensor = network(
            hidden_states=tokens.to(dtype),
            timestep=timestep.to(dtype) / 1000,
            guidance=embedded_guidance(network, self.embedded_guidance, x),
            pooled_projections=conditioning["pooled_prompt_embeds"].to(dtype),
            encoder_hidden_states=prompts.to(dtype),
            txt_ids=positions.new_zeros(prompts.shape[1], 3),
            img_ids=positions,
            return_dict=False,
        )[0]
        return from_tokens(output[:, :own], x.shape)

    @torch.no_grad()
    def encode_prompts(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        max_sequence_length: int,
        images: Sequence[Image] | None = None,
    ) -> dict[str, Tensor]:
        embeds, pooled, _ = pipeline.encode_prompt(list(prompts), max_sequence_length=max_sequence_length)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def conditioning_shapes(
        self, config: Mapping[str, Any], tokens: int, latent: Sequence[int]
    ) -> dict[str, tuple[int, ...]]:
        return {
            "prompt_embeds": (tokens, config["joint_attention_dim"]),
            "pooled_prompt_embeds": (config["pooled_projection_dim"],),
        }

    def image_shapes(self, pipeline: DiffusionPipeline, latent: Sequence[int]) -> dict[str, tuple[int, ...]]:
        columns, rows = _preferred(latent[-1] / latent[-2], 2 * pipeline.vae_scale_factor)
        return {"image_latents": (latent[0], rows // pipeline.vae_scale_factor, columns // pipeline.vae_scale_factor)}

    @torch.no_grad()
    def encode_images(
        self, pipeline: DiffusionPipeline, images: Sequence[Image], height: int, width: int, frames: int
    ) -> dict[str, Tensor]:
        processor, side, latents = pipeline.image_processor, 2 * pipeline.vae_scale_factor, []
        for image in images:
            if min(image.size) < side:
                raise ValueError(f"FLUX.1 Kontext takes pictures of {side}x{side} pixels or more, found {image.size}")
            shown_height, shown_width = processor.get_default_height_width(image)
            columns, rows = _preferred(shown_width / shown_height, side)
            pixels = processor.preprocess(processor.resize(image, rows, columns), rows, columns)
            latents.append(pipeline._encode_vae_image(pixels.to(pipeline.vae.device, pipeline.vae.dtype), None))
        return {"image_latents": torch.cat(latents)}

    @torch.no_grad()
    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        return decode_pictures(pipeline.vae, latents)


def _preferred(ratio: float, side: int) -> tuple[int, int]:
    """Width and height of the size nearest to an aspect ratio that Kontext sees pictures in, multiples of ``side``."""
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    _, *size = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    columns, rows = (each // side * side for each in size)
    return columns, rows

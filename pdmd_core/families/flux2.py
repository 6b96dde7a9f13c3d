"""FLUX.2: ``Flux2Pipeline`` (dev) and ``Flux2KleinPipeline`` with one ``Flux2Transformer2DModel``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..flow import Sigma
from .base import Conditioning, ModelFamily
from .flux_layout import ATTENTION, NORMS, PREFIX, SCALES, native_blocks
from .guidance import embedded_guidance
from .lora_keys import LoraKeys
from .module_names import ModuleNames
from .native_layout import NativeLayout
from .pictures import picture_latent_size

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, Flux2Transformer2DModel
    from PIL.Image import Image

_TARGETS = (
    *(f"attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{part}" for part in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{side}.{part}" for side in ("ff", "ff_context") for part in ("linear_in", "linear_out")),
    "attn.to_qkv_mlp_proj",
    "attn.to_out",
)
_BLOCKS = ("transformer_blocks", "single_transformer_blocks")
_MODULES = {name: name for name in _TARGETS}
_MODULATION = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
_LAYOUT = NativeLayout(
    native_blocks(
        ATTENTION
        | {
            "img_mlp.0": ("ff.linear_in",),
            "img_mlp.2": ("ff.linear_out",),
            "txt_mlp.0": ("ff_context.linear_in",),
            "txt_mlp.2": ("ff_context.linear_out",),
        },
        NORMS | {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
    ),
    {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        **{f"{name}.lin": f"{name}.linear" for name in _MODULATION},
        **{
            f"{native}.{layer}": f"time_guidance_embed.{own}_embedder.linear_{n}"
            for own, native in (("timestep", "time_in"), ("guidance", "guidance_in"))
            for n, layer in ((1, "in_layer"), (2, "out_layer"))
        },
    },
    swapped=("norm_out.linear",),
    scales=SCALES,
)
_MOST = 1024 * 1024
"""Pixels of a picture to edit; larger ones are made smaller."""
_OF_PICTURE = 10
"""The index of its tokens; those of the sample have 0."""


class Flux2Family(ModelFamily):
    """The network's timestep is sigma; latents are (4 * channels, height / 16, width / 16), a token each.

    Latents have the statistics of the autoencoder's batch norm. dev has no classifier-free guidance: its
    ``guidance_scale`` is an input of the network, 4 as in the pipeline's call. klein guides away from the empty prompt.
    Prompts have ``max_sequence_length`` tokens. With a picture to edit there are ``image_latents``, whose tokens follow
    those of the sample. ComfyUI and diffusers read LoRA files under diffusers' names.
    """

    name = "flux2"
    title = "FLUX.2"
    architecture = "Flux2Transformer2DModel"
    blocks = _BLOCKS
    modules = _MODULES
    lora_targets = _TARGETS
    lora_keys = LoraKeys(prefix=PREFIX, down=".lora_A.weight", up=".lora_B.weight", alpha=None)
    lora_names = ModuleNames(layout=_LAYOUT)
    native_layout = _LAYOUT
    default_base = "black-forest-labs/FLUX.2-dev"
    embedded_guidance = 4.0
    context_parallel = False  # diffusers has a plan, which was not compared with one process
    comfyui_sampling = "ModelSamplingAuraFlow"

    def latent_shape(self, pipeline: DiffusionPipeline, height: int, width: int, frames: int) -> tuple[int, ...]:
        rows, columns = picture_latent_size(self.title, pipeline, height, width, frames)
        return pipeline.transformer.config.in_channels, rows // 2, columns // 2

    def velocity(self, network: nn.Module, x: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        # What `network.dtype` is, which looks through all modules.
        dtype = cast("Flux2Transformer2DModel", network).x_embedder.weight.dtype
        # The pipeline rounds timesteps to the dtype of its latents before it divides.
        timestep = torch.as_tensor(sigma, device=x.device, dtype=torch.float32).expand(len(x)) * 1000
        prompts = conditioning["prompt_embeds"].to(dtype)
        tokens, positions = x.flatten(2), _positions(x, x.shape[2], x.shape[3], 1)
        own = tokens.shape[2]
        if (image := conditioning.get("image_latents")) is not None:
            tokens = torch.cat([tokens, image.flatten(2).to(x.dtype)], dim=2)
            positions = torch.cat([positions, _positions(x, image.shape[2], image.shape[3], 1, _OF_PICTURE)])
        output: Tensor = network(
            hidden_states=tokens.transpose(1, 2).to(dtype),
            timestep=timestep.to(dtype) / 1000,
            guidance=embedded_guidance(network, self.embedded_guidance, x),
            encoder_hidden_states=prompts,
            txt_ids=_positions(x, 1, 1, prompts.shape[1]),
            img_ids=positions,
            return_dict=False,
        )[0]
        velocity: Tensor = output[:, :own].transpose(1, 2).unflatten(2, x.shape[2:])
        return velocity

    @torch.no_grad()
    def encode_prompts(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        max_sequence_length: int,
        images: Sequence[Image] | None = None,
    ) -> dict[str, Tensor]:
        embeds, _ = pipeline.encode_prompt(list(prompts), max_sequence_length=max_sequence_length)
        return {"prompt_embeds": embeds}

    def conditioning_shapes(
        self, config: Mapping[str, Any], tokens: int, latent: Sequence[int]
    ) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (tokens, config["joint_attention_dim"])}

    def needs_image(self, pipeline: DiffusionPipeline | type[DiffusionPipeline]) -> bool:
        return False

    def image_shapes(self, pipeline: DiffusionPipeline, latent: Sequence[int]) -> dict[str, tuple[int, ...]]:
        side = 2 * pipeline.vae_scale_factor
        height, width = (part * side for part in latent[-2:])
        if (shrunk := math.sqrt(_MOST / (height * width))) < 1:
            height, width = int(height * shrunk), int(width * shrunk)
        return {"image_latents": (latent[0], height // side, width // side)}

    @torch.no_grad()
    def encode_images(
        self, pipeline: DiffusionPipeline, images: Sequence[Image], height: int, width: int, frames: int
    ) -> dict[str, Tensor]:
        processor, side, latents = pipeline.image_processor, 2 * pipeline.vae_scale_factor, []
        for image in images:
            processor.check_image_input(image)
            shown = processor._resize_to_target_area(image, _MOST) if image.width * image.height > _MOST else image
            columns, rows = (length // side * side for length in shown.size)
            pixels = processor.preprocess(shown, height=rows, width=columns, resize_mode="crop")
            latents.append(pipeline._encode_vae_image(pixels.to(pipeline.vae.device, pipeline.vae.dtype), None))
        return {"image_latents": torch.cat(latents)}

    def guidance_arguments(self, scale: float, pipeline: type[DiffusionPipeline] | None = None) -> dict[str, float]:
        from diffusers import Flux2Pipeline

        if pipeline is None or not issubclass(pipeline, Flux2Pipeline):
            return super().guidance_arguments(scale, pipeline)
        if scale != 1.0:
            raise ValueError(f"FLUX.2 dev has no classifier-free guidance in its pipeline, found scale {scale:g}")
        return {}

    @torch.no_grad()
    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        latents = latents.to(vae.device, vae.dtype)
        mean, variance = (values.to(latents).view(1, -1, 1, 1) for values in (vae.bn.running_mean, vae.bn.running_var))
        latents = latents * torch.sqrt(variance + vae.config.batch_norm_eps) + mean
        pixels: Tensor = vae.decode(functional.pixel_shuffle(latents, 2), return_dict=False)[0]
        return (pixels.float().unsqueeze(1) / 2 + 0.5).clamp(0, 1)


def _positions(x: Tensor, rows: int, columns: int, tokens: int, index: int = 0) -> Tensor:
    """Index, row, column and place in the text of each token, of shape (rows * columns * tokens, 4)."""
    sides = [torch.arange(side, device=x.device) for side in (rows, columns, tokens)]
    return torch.cartesian_prod(torch.tensor([index], device=x.device), *sides)

"""Z-Image: ``ZImagePipeline`` with one ``ZImageTransformer2DModel``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..flow import Sigma
from .base import Conditioning, ModelFamily, picture_latent_size

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ZImageTransformer2DModel
    from PIL.Image import Image

_TARGETS = (
    "attention.to_q",
    "attention.to_k",
    "attention.to_v",
    "attention.to_out.0",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)
_MODULE = re.compile(rf"(layers|noise_refiner|context_refiner)\.\d+\.({'|'.join(map(re.escape, _TARGETS))})")


class ZImageFamily(ModelFamily):
    """Latents are (channels, height / 8, width / 8); the network takes 1 - sigma and predicts the negative velocity.

    Guidance of the pipeline is counted from 0: its ``guidance_scale`` 3 is 4 here.
    """

    name = "z_image"
    architecture = "ZImageTransformer2DModel"
    lora_targets = _TARGETS

    def latent_shape(self, pipeline: DiffusionPipeline, height: int, width: int, frames: int) -> tuple[int, ...]:
        size = picture_latent_size("Z-Image", pipeline, height, width, frames)
        return pipeline.transformer.config.in_channels, *size

    def velocity(self, network: nn.Module, x: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        # What `network.dtype` is, which looks through all modules.
        dtype = cast("ZImageTransformer2DModel", network).x_pad_token.dtype
        timestep = torch.as_tensor(sigma, device=x.device, dtype=torch.float32).expand(len(x)) * 1000
        # Positions in the picture start after those of the prompt, so padding must not count.
        masks = conditioning["prompt_mask"].bool()
        prompts = [embeds[mask] for embeds, mask in zip(conditioning["prompt_embeds"].to(dtype), masks, strict=True)]
        pictures = list(x.to(dtype).unsqueeze(2).unbind())
        output = network(pictures, (1000 - timestep) / 1000, prompts, return_dict=False)[0]
        return -torch.stack(list(output)).squeeze(2)

    @torch.no_grad()
    def encode_prompts(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        max_sequence_length: int,
        images: Sequence[Image] | None = None,
    ) -> dict[str, Tensor]:
        embeds, _ = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        masks = [torch.ones(len(tokens), dtype=torch.long, device=tokens.device) for tokens in embeds]
        return {"prompt_embeds": pad_sequence(embeds, batch_first=True), "prompt_mask": pad_sequence(masks, True)}

    @torch.no_grad()
    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        pixels: Tensor = vae.decode(latents, return_dict=False)[0]
        return (pixels.float().unsqueeze(1) / 2 + 0.5).clamp(0, 1)

    def native_module_name(self, diffusers_name: str) -> str:
        if not _MODULE.fullmatch(diffusers_name):
            raise ValueError(
                "a Z-Image module to adapt is layers|noise_refiner|context_refiner.<n>.<one of "
                f"{', '.join(_TARGETS)}>, found {diffusers_name!r}"
            )
        return diffusers_name

    def diffusers_module_name(self, native_name: str) -> str:
        return self.native_module_name(native_name)

    def native_weight_name(self, diffusers_name: str) -> str:
        raise ValueError(
            f"{diffusers_name!r} has no weight of its own in ComfyUI's layout of {self.architecture}, which joins "
            "attention's projections: use LoRA experts"
        )

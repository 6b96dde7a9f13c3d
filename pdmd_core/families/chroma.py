"""Chroma: ``ChromaPipeline`` with one ``ChromaTransformer2DModel``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..flow import Sigma
from .base import Conditioning, ModelFamily
from .flux_layout import BLOCKS, PLAIN_BLOCKS, PREFIX, SCALES, SHARES, TARGETS, grid_positions
from .lora_keys import LoraKeys
from .module_names import ModuleNames
from .native_layout import NativeLayout
from .pictures import decode_pictures, from_tokens, picture_latent_size, to_tokens

if TYPE_CHECKING:
    from diffusers import ChromaTransformer2DModel, DiffusionPipeline
    from PIL.Image import Image

_LAYERS = range(5)
"""Of the network that makes the modulation of all blocks."""
_APPROXIMATOR = "distilled_guidance_layer"
_LAYOUT = NativeLayout(
    PLAIN_BLOCKS,
    {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "final_layer.linear": "proj_out",
        **{f"{_APPROXIMATOR}.{name}": f"{_APPROXIMATOR}.{name}" for name in ("in_proj", "out_proj")},
        **{f"{_APPROXIMATOR}.norms.{n}": f"{_APPROXIMATOR}.norms.{n}" for n in _LAYERS},
        **{
            f"{_APPROXIMATOR}.layers.{n}.{layer}": f"{_APPROXIMATOR}.layers.{n}.linear_{k}"
            for n in _LAYERS
            for k, layer in ((1, "in_layer"), (2, "out_layer"))
        },
    },
    shares=SHARES,
    scales=(*SCALES, *(f"norms.{n}" for n in _LAYERS)),
)


class ChromaFamily(ModelFamily):
    """The network's timestep is sigma; latents are (channels, height / 8, width / 8), packed 2x2 for the network.

    The blocks are FLUX.1's without modulation of their own. Prompts have ``max_sequence_length`` tokens; which of them
    count, one of padding among them, is ``prompt_attention_mask``: diffusers adds it to the scores of attention, so
    that masked tokens count less and not nothing.
    """

    name = "chroma"
    title = "Chroma"
    architecture = "ChromaTransformer2DModel"
    blocks = BLOCKS
    modules = {name: name for name in TARGETS}  # noqa: RUF012
    lora_targets = TARGETS
    lora_keys = LoraKeys(prefix=PREFIX, down=".lora_A.weight", up=".lora_B.weight", alpha=None)
    lora_names = ModuleNames(layout=_LAYOUT)
    native_layout = _LAYOUT
    default_base = "lodestones/Chroma1-HD"
    comfyui_sampling = "ModelSamplingAuraFlow"

    def latent_shape(self, pipeline: DiffusionPipeline, height: int, width: int, frames: int) -> tuple[int, ...]:
        size = picture_latent_size(self.title, pipeline, height, width, frames)
        return pipeline.transformer.config.in_channels // 4, *size

    def velocity(self, network: nn.Module, x: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        # What `network.dtype` is, which looks through all modules.
        dtype = cast("ChromaTransformer2DModel", network).x_embedder.weight.dtype
        # The pipeline rounds timesteps to the dtype of its latents before it divides.
        timestep = torch.as_tensor(sigma, device=x.device, dtype=torch.float32).expand(len(x)) * 1000
        tokens, positions, prompts = to_tokens(x), grid_positions(x), conditioning["prompt_embeds"]
        mask = conditioning["prompt_attention_mask"].to(dtype)
        output: Tensor = network(
            hidden_states=tokens.to(dtype),
            timestep=timestep.to(dtype) / 1000,
            encoder_hidden_states=prompts.to(dtype),
            attention_mask=torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1),
            txt_ids=positions.new_zeros(prompts.shape[1], 3),
            img_ids=positions,
            return_dict=False,
        )[0]
        return from_tokens(output, x.shape)

    @torch.no_grad()
    def encode_prompts(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        max_sequence_length: int,
        images: Sequence[Image] | None = None,
    ) -> dict[str, Tensor]:
        embeds, _, mask, *_ = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def conditioning_shapes(
        self, config: Mapping[str, Any], tokens: int, latent: Sequence[int]
    ) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (tokens, config["joint_attention_dim"]), "prompt_attention_mask": (tokens,)}

    @torch.no_grad()
    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        return decode_pictures(pipeline.vae, latents)

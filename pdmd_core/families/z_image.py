"""Z-Image: ``ZImagePipeline`` with one ``ZImageTransformer2DModel``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..flow import Sigma, of_each_sample
from .base import Conditioning, ModelFamily
from .module_names import ModuleNames
from .native_layout import NativeBlocks, NativeLayout
from .pictures import decode_pictures, picture_latent_size

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
_MODULES = {name: name for name in _TARGETS}
_NAMES = ModuleNames(
    blocks=("layers", "noise_refiner", "context_refiner"),
    in_block=_MODULES
    | {name: name for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2", "adaLN_modulation.0")}
    | {"attention.norm_q": "attention.q_norm", "attention.norm_k": "attention.k_norm"},
    outside={
        "all_x_embedder.2-1": "x_embedder",
        "all_final_layer.2-1.linear": "final_layer.linear",
        "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
    }
    | {name: name for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1")},
    parameters={"x_pad_token": "x_pad_token", "cap_pad_token": "cap_pad_token"},
    joined={
        "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
        "attention.out": ("attention.to_out.0",),
    },
)
"""Native names are those that ComfyUI reads in LoRA files; its network has attention's projections in one weight."""
_IN_BLOCK = {native: (own,) for own, native in _NAMES.in_block.items() if not own.startswith("attention.to_")}
_LAYOUT = NativeLayout(
    tuple(NativeBlocks(name, name, _IN_BLOCK | dict(_NAMES.joined)) for name in _NAMES.blocks),
    {native: own for own, native in _NAMES.outside.items()},
    _NAMES.parameters,
)
_LORA = re.compile(r"(layers|noise_refiner|context_refiner)[._]\d+[._]attention[._]to_")


class ZImageFamily(ModelFamily):
    """Latents are (channels, height / 8, width / 8); the network takes 1 - sigma and predicts the negative velocity.

    The pipeline counts the guidance that is added: its ``guidance_scale`` 3 is 4 here.
    """

    name = "z_image"
    title = "Z-Image"
    architecture = "ZImageTransformer2DModel"
    blocks = ("layers", "noise_refiner", "context_refiner")
    modules = _MODULES
    lora_targets = _TARGETS
    lora_names = _NAMES
    native_layout = _LAYOUT
    unguided = 0.0
    comfyui_sampling = "ModelSamplingAuraFlow"

    def latent_shape(self, pipeline: DiffusionPipeline, height: int, width: int, frames: int) -> tuple[int, ...]:
        size = picture_latent_size(self.title, pipeline, height, width, frames)
        return pipeline.transformer.config.in_channels, *size

    def velocity(self, network: nn.Module, x: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        # What `network.dtype` is, which looks through all modules.
        dtype = cast("ZImageTransformer2DModel", network).x_pad_token.dtype
        timestep = of_each_sample(sigma, x) * 1000
        # Positions in the picture start after those of the prompt, so padding must not count.
        lengths = conditioning["prompt_mask"].bool().sum(1).tolist()
        embeds = conditioning["prompt_embeds"].to(dtype)
        prompts = [tokens[:length] for tokens, length in zip(embeds, lengths, strict=True)]
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

    def conditioning_shapes(
        self, config: Mapping[str, Any], tokens: int, latent: Sequence[int]
    ) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (tokens, config["cap_feat_dim"]), "prompt_mask": (tokens,)}

    @torch.no_grad()
    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        return decode_pictures(pipeline.vae, latents)

    def owns_lora(self, modules: Sequence[str]) -> bool:
        # the layout of the original code, with attention.qkv, is Lumina 2's too
        return any(_LORA.search(module) for module in modules)

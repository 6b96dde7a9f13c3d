"""Wan 2.1 and 2.2: ``WanPipeline`` and ``WanImageToVideoPipeline`` with one or two ``WanTransformer3DModel``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..flow import Sigma, like, of_each_sample
from ..phases import PhasePlan
from . import wan_autoencoder
from .base import Conditioning, ModelFamily
from .module_names import ModuleNames
from .routing import TeacherRouting

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, WanTransformer3DModel
    from PIL.Image import Image

_MODULES = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
_LORA = re.compile(r"(?:^|\.|(?<!transformer)_)blocks[._]\d+[._](self_attn|cross_attn|attn[12]|ffn)[._]")
"""Not of ``transformer_blocks``, which other models have."""

_NAMES = ModuleNames(
    blocks=("blocks",),
    in_block=_MODULES
    | {
        "attn1.norm_q": "self_attn.norm_q",
        "attn1.norm_k": "self_attn.norm_k",
        "attn2.norm_q": "cross_attn.norm_q",
        "attn2.norm_k": "cross_attn.norm_k",
        "attn2.add_k_proj": "cross_attn.k_img",
        "attn2.add_v_proj": "cross_attn.v_img",
        "attn2.norm_added_k": "cross_attn.norm_k_img",
        "norm2": "norm3",  # the one norm with weights; the layouts number them in another order
    },
    outside={
        "patch_embedding": "patch_embedding",
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
        "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
        "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
        "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
        "proj_out": "head.head",
    },
    block_parameters={"scale_shift_table": "modulation"},
    parameters={
        "scale_shift_table": "head.modulation",
        "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    },
)

_IMAGE_TOKENS = 257
"""Of CLIP's ViT-H/14 at 224 pixels, which Wan 2.1 sees the image with."""
_JUST_ABOVE = 1.0005
"""Steps of a plan lie further apart, and rounding of timesteps is finer."""


class WanFamily(ModelFamily):
    """Timesteps are ``sigma * 1000``; latents are (channels, latent frames, height / 8, width / 8), 16 in Wan 2.2 5B.

    Image to video: ``image_latents`` (of the clip that starts with the image) go beside the sample, with
    ``image_embeds`` of CLIP in Wan 2.1. Between two images: ``first_last_latents`` instead, and the embeds of both; the
    network of Wan 2.1 made for it has places for those (``pos_embed_seq_len``). Wan 2.2 5B has ``first_frame``
    instead, the latent that the clip starts with.
    Wan 2.2 A14B is two networks: ``transformer`` at sigma >= 0.875 (0.9 from images), ``transformer_2`` below.
    """

    name = "wan"
    title = "Wan"
    architecture = "WanTransformer3DModel"
    extensions = ("WanVACETransformer3DModel", "WanAnimateTransformer3DModel")
    blocks = ("blocks",)
    modules = _MODULES
    lora_targets = tuple(_MODULES)
    lora_names = _NAMES
    default_base = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    makes_clips = True
    comfyui_pipelines = ("WanPipeline",)

    def latent_shape(self, pipeline: DiffusionPipeline, height: int, width: int, frames: int) -> tuple[int, ...]:
        spatial, temporal = pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal
        side = math.lcm(16, spatial * pipeline.transformer.config.patch_size[1])
        if height % side or width % side or height < side or width < side:
            raise ValueError(f"Wan pictures have sides that are multiples of {side}, found {width}x{height}")
        if frames < 1 or (frames - 1) % temporal:
            raise ValueError(f"Wan clips have 1 + a multiple of {temporal} frames, found {frames}")
        channels = pipeline.transformer.config.out_channels  # image to video has more of them coming in
        return channels, 1 + (frames - 1) // temporal, height // spatial, width // spatial

    def velocity(self, network: nn.Module, x: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        timestep = of_each_sample(sigma, x) * 1000
        wan = cast("WanTransformer3DModel", network)
        # What `wan.dtype` is, which looks through all modules; diffusers keeps some of Wan's weights in float32.
        dtype = wan.patch_embedding.weight.dtype
        sample, first_frame = x, conditioning.get("first_frame")
        if first_frame is not None:
            sample, timestep = _starting_with(first_frame.to(x.dtype), x), _of_tokens(timestep, x)
        for name, last in (("image_latents", False), ("first_last_latents", True)):
            if name in conditioning:
                beside = _image_channels(conditioning[name], wan.config["in_channels"], last)
                sample = torch.cat([x, beside], dim=1)
        images = {}
        if "image_embeds" in conditioning:
            embeds = conditioning["image_embeds"].to(dtype)
            if wan.config["pos_embed_seq_len"] is not None:  # the network takes the images of a sample as two rows
                embeds = embeds.unflatten(1, (2, -1)).flatten(0, 1)
            images["encoder_hidden_states_image"] = embeds
        velocity: Tensor = wan(
            hidden_states=sample.to(dtype),
            timestep=timestep,
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            return_dict=False,
            **images,
        )[0]
        if first_frame is None:
            return velocity
        # The first frame is given: x_0 is known there, and with it the velocity.
        known = (x[:, :, :1] - first_frame) / like(sigma, x)
        return _starting_with(known, velocity)

    def teacher_routing(self, config: Mapping[str, Any]) -> TeacherRouting:
        second = config.get("transformer_2") or [None]
        if config.get("boundary_ratio") is None or second[0] is None:
            return TeacherRouting()
        return TeacherRouting(("transformer", "transformer_2"), float(config["boundary_ratio"]))

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
        return {"prompt_embeds": embeds}

    def conditioning_shapes(
        self, config: Mapping[str, Any], tokens: int, latent: Sequence[int]
    ) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (tokens, config["text_dim"])}
        both = self.needs_last_image(config)
        if config["in_channels"] > config["out_channels"]:
            shapes["first_last_latents" if both else "image_latents"] = tuple(latent)
        if config.get("image_dim"):
            shapes["image_embeds"] = (config["pos_embed_seq_len"] if both else _IMAGE_TOKENS, config["image_dim"])
        return shapes

    def image_shapes(self, pipeline: DiffusionPipeline, latent: Sequence[int]) -> dict[str, tuple[int, ...]]:
        return {"first_frame": (latent[0], 1, *latent[2:])} if pipeline.config.get("expand_timesteps") else {}

    @torch.no_grad()
    def encode_images(
        self, pipeline: DiffusionPipeline, images: Sequence[Image], height: int, width: int, frames: int
    ) -> dict[str, Tensor]:
        return self._encode(pipeline, [(image,) for image in images], height, width, frames)

    def needs_last_image(self, config: Mapping[str, Any]) -> bool:
        return config.get("pos_embed_seq_len") is not None

    @torch.no_grad()
    def encode_first_and_last(
        self,
        pipeline: DiffusionPipeline,
        images: Sequence[Image],
        last_images: Sequence[Image],
        height: int,
        width: int,
        frames: int,
    ) -> dict[str, Tensor]:
        if pipeline.config.get("expand_timesteps"):
            raise ValueError("Wan 2.2 5B takes no last image, its pipeline passes it over")
        return self._encode(pipeline, list(zip(images, last_images, strict=True)), height, width, frames)

    def _encode(
        self, pipeline: DiffusionPipeline, images: Sequence[tuple[Image, ...]], height: int, width: int, frames: int
    ) -> dict[str, Tensor]:
        """images: of each sample, the first one, or it and the last."""
        device, channels = pipeline.vae.device, pipeline.vae.config.z_dim
        size = {"height": height, "width": width, "num_frames": frames}
        found: dict[str, list[Tensor]] = {}
        for each in images:
            first, *last = (
                pipeline.video_processor.preprocess(image, height=height, width=width).to(device, torch.float32)
                for image in each
            )
            _, latents, *masks = pipeline.prepare_latents(
                first, 1, channels, **size, dtype=torch.float32, device=device, last_image=last[0] if last else None
            )
            if masks:  # Wan 2.2 5B
                found.setdefault("first_frame", []).append(latents)
            else:  # the mask before the latents is the same for every image
                found.setdefault("first_last_latents" if last else "image_latents", []).append(latents[:, -channels:])
            if pipeline.image_encoder is not None:
                embeds = pipeline.encode_image(list(each), device)
                found.setdefault("image_embeds", []).append(embeds.flatten(0, 1).unsqueeze(0))
        return {name: torch.cat(values) for name, values in found.items()}

    @torch.no_grad()
    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        return wan_autoencoder.decode(pipeline.vae, latents)

    def lora_arguments(self, component: str) -> dict[str, Any]:
        return {"load_into_transformer_2": True} if component == "transformer_2" else super().lora_arguments(component)

    def owns_lora(self, modules: Sequence[str]) -> bool:
        # others have blocks of self_attn and cross_attn too, with other names in them
        return any(_LORA.search(module) and self.lora_names.place(module) for module in modules)

    def released_components(self, files: int) -> tuple[str, ...]:
        return ("transformer", "transformer_2") if files == 2 else super().released_components(files)

    def native_weight_name(self, diffusers_name: str) -> str:
        name = self.lora_names.native_weight(diffusers_name)
        if name is None:
            raise ValueError(f"{diffusers_name!r} is not a weight of {self.architecture}")
        return name

    def comfyui_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        heads = config["num_attention_heads"]
        true = {
            "num_heads": heads,
            "text_dim": config["text_dim"],
            "freq_dim": config["freq_dim"],
            "eps": config["eps"],
            "cross_attn_norm": config["cross_attn_norm"],
            "patch_size": list(config["patch_size"]),
            "out_dim": config["out_channels"],
        }
        patch = math.prod(config["patch_size"])
        guessed = {
            "num_heads": heads * config["attention_head_dim"] // 128,
            "text_dim": 4096,
            "freq_dim": 256,
            "eps": 1e-6,
            "cross_attn_norm": True,
            "patch_size": [1, 2, 2],
            "out_dim": config["out_channels"] * patch // 4,
        }
        return {key: value for key, value in true.items() if value != guessed[key]}

    def native_autoencoder(self, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return wan_autoencoder.native_autoencoder(config, state)

    def stock_routing(self, plan: PhasePlan, components: Sequence[str]) -> dict[str, Any]:
        if set(components) == {"transformer"}:
            return {"boundary_ratio": None}
        later = list(components).index("transformer_2") if "transformer_2" in components else 0
        names = ["transformer"] * later + ["transformer_2"] * (len(components) - later)
        if not later or list(components) != names:
            raise ValueError(
                f"a stock WanPipeline runs transformer, then transformer_2, found {', '.join(components)}: sample "
                "these experts with this package"
            )
        # WanPipeline gives a timestep on the boundary to the earlier network, a plan to the later one.
        return {"boundary_ratio": plan.phases[later].sigmas[0] * _JUST_ABOVE}


def _image_channels(latents: Tensor, in_channels: int, last: bool) -> Tensor:
    """What goes beside the sample: a mask that is 1 in the given frames, then the latents of their clip.

    last: The last frame is given, too, which is the last of those that the last latent frame stands for.
    """
    given = in_channels - 2 * latents.shape[1]
    mask = latents.new_zeros(len(latents), given, *latents.shape[2:])
    mask[:, :, 0] = 1
    mask[:, -1, -1] = mask[:, -1, -1] if not last else 1
    return torch.cat([mask, latents], dim=1)


def _starting_with(first_frame: Tensor, x: Tensor) -> Tensor:
    return torch.cat([first_frame, x[:, :, 1:]], dim=2)


def _of_tokens(timestep: Tensor, x: Tensor) -> Tensor:
    """Timesteps (batch,) as (batch, tokens): 0 in the first frame, which is clean."""
    frames, height, width = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
    each = timestep[:, None, None].repeat(1, frames, height * width)
    each[:, 0] = 0
    return each.flatten(1)

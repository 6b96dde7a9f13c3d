"""LTX-2: ``LTX2Pipeline`` and ``LTX2ImageToVideoPipeline`` with one network, which makes a clip and its sound."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..flow import Sigma, like, of_each_sample
from .base import Conditioning, ModelFamily
from .lora_keys import LoraKeys
from .module_names import ModuleNames

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, LTX2VideoTransformer3DModel
    from PIL.Image import Image

_ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
_TARGETS = (
    *(f"{attention}.{part}" for attention in _ATTENTIONS for part in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"{side}.{part}" for side in ("ff", "audio_ff") for part in ("net.0.proj", "net.2")),
)
_MODULES = {name: name for name in (*_TARGETS, *(f"{attention}.to_gate_logits" for attention in _ATTENTIONS))}
_EMBEDDERS = {
    "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single",
    "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
}
_TABLES = ("scale_shift_table", "audio_scale_shift_table")
_NAMES = ModuleNames(
    blocks=("transformer_blocks",),
    in_block=_MODULES
    | {f"{attention}.norm_{part}": f"{attention}.{part}_norm" for attention in _ATTENTIONS for part in "qk"},
    outside={
        "proj_in": "patchify_proj",
        "audio_proj_in": "audio_patchify_proj",
        **{name: name for name in ("proj_out", "audio_proj_out")},
        **{
            f"{side}caption_projection.linear_{n}": f"{side}caption_projection.linear_{n}"
            for side in ("", "audio_")
            for n in (1, 2)
        },
        **{
            f"{own}.{layer}": f"{native}.{layer}"
            for own, native in _EMBEDDERS.items()
            for layer in ("linear", *(f"emb.timestep_embedder.linear_{n}" for n in (1, 2)))
        },
    },
    block_parameters={
        **{name: name for name in (*_TABLES, "prompt_scale_shift_table", "audio_prompt_scale_shift_table")},
        "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
        "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
    },
    parameters={name: name for name in _TABLES},
)
_LORA = re.compile(r"transformer_blocks[._]\d+[._](audio_|video_to_audio_)")

_PIXELS, _FRAMES = 32, 8
"""Of a sample in each direction for one of its latent: a fact of the network too, whose positions are in pixels."""
_FRAME_RATE = 24.0
"""Frames per second, the default of the pipeline's call: positions in time are in seconds."""
_PITCHES = 16
"""Of the latents of sound, which the network has in its features."""


class Ltx2Family(ModelFamily):
    """Timesteps are ``sigma * 1000``; latents are those of the clip and, in further channels, those of its sound.

    Their shape is (channels + more, latent frames, height / 32, width / 32). The numbers of the ``more`` channels, one
    after the other, are the latents of the sound (channels, length, pitches), then some that mean nothing and whose x_0
    is 0. The sound is as long as the clip, which has 24 frames per second. So clip and sound are noised, sampled and
    distilled as one, every number with the same weight; ``decode`` gives the clip, the pipeline both.

    Image to video: ``first_frame``, the latent that the clip starts with. ``prompt_embeds`` and
    ``prompt_audio_embeds`` come from the connectors, which are not distilled. Guidance is classifier-free, of one scale
    for both: that of skipped layers and of isolated modalities, which the call has by default, is none here.
    """

    name = "ltx2"
    title = "LTX-2"
    architecture = "LTX2VideoTransformer3DModel"
    blocks = ("transformer_blocks",)
    modules = _MODULES
    lora_targets = _TARGETS
    lora_names = _NAMES
    lora_keys = LoraKeys(down=".lora_A.weight", up=".lora_B.weight", alpha=None)
    default_base = "Lightricks/LTX-2"
    makes_clips, frame_rate = True, _FRAME_RATE
    context_parallel = False  # diffusers has a plan, which was not compared with one process
    comfyui_sampling = "ModelSamplingAuraFlow"

    def latent_shape(self, pipeline: DiffusionPipeline, height: int, width: int, frames: int) -> tuple[int, ...]:
        from diffusers import LTX2ImageToVideoPipeline, LTX2Pipeline

        if not isinstance(pipeline, (LTX2Pipeline, LTX2ImageToVideoPipeline)):
            # the others give the network more than it is given here
            raise ValueError(
                f"{self.title} is known as an LTX2Pipeline or LTX2ImageToVideoPipeline, found a "
                f"{type(pipeline).__name__}"
            )
        config = pipeline.transformer.config
        ratios = pipeline.vae_spatial_compression_ratio, pipeline.vae_temporal_compression_ratio
        if ratios != (_PIXELS, _FRAMES) or (config.patch_size, config.patch_size_t) != (1, 1):
            raise ValueError(
                f"{self.title} has a token for {_PIXELS} pixels and {_FRAMES} frames, found patches of "
                f"{config.patch_size} and {config.patch_size_t} latents of {ratios[0]} pixels and {ratios[1]} frames"
            )
        if (sound := pipeline.audio_vae) is not None:  # a description of the pipeline has none
            pitches = sound.config.mel_bins // pipeline.audio_vae_mel_compression_ratio
            if pitches != _PITCHES:
                raise ValueError(f"the sound of {self.title} has latents of {_PITCHES} pitches, found {pitches}")
        if height % _PIXELS or width % _PIXELS or height < _PIXELS or width < _PIXELS:
            raise ValueError(f"{self.title} clips have sides that are multiples of {_PIXELS}, found {width}x{height}")
        if frames < 1 or (frames - 1) % _FRAMES:
            raise ValueError(f"{self.title} clips have 1 + a multiple of {_FRAMES} frames, found {frames}")
        size = 1 + (frames - 1) // _FRAMES, height // _PIXELS, width // _PIXELS
        more = math.ceil(_length(size[0], config) * config.audio_in_channels / math.prod(size))
        return config.in_channels + more, *size

    def velocity(self, network: nn.Module, x: Tensor, sigma: Sigma, conditioning: Conditioning) -> Tensor:
        ltx = cast("LTX2VideoTransformer3DModel", network)
        dtype, config = ltx.proj_in.weight.dtype, ltx.config
        timestep = of_each_sample(sigma, x) * 1000
        frames, height, width = x.shape[2:]
        length = _length(frames, config)
        sound, unused = _without_rest(x[:, config.in_channels :], length * config.audio_in_channels)
        mask = conditioning["prompt_mask"].to(x.device, non_blocking=True)
        sample, of_tokens = x[:, : config.in_channels], timestep
        if (first_frame := conditioning.get("first_frame")) is not None:
            sample = _starting_with(first_frame.to(x.dtype), sample)
            clean = torch.arange(frames * height * width, device=x.device) < height * width
            of_tokens = torch.where(clean, 0, timestep[:, None])
        tokens, sounds = ltx(
            hidden_states=sample.flatten(2).transpose(1, 2).to(dtype),
            audio_hidden_states=sound.unflatten(1, (-1, length, _PITCHES)).transpose(1, 2).flatten(2).to(dtype),
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            audio_encoder_hidden_states=conditioning["prompt_audio_embeds"].to(dtype),
            timestep=of_tokens,
            audio_timestep=timestep,
            sigma=timestep,
            encoder_attention_mask=mask,
            audio_encoder_attention_mask=mask,
            num_frames=frames,
            height=height,
            width=width,
            fps=_FRAME_RATE,
            audio_num_frames=length,
            use_cross_timestep=True,
            return_dict=False,
        )
        clip = tokens.transpose(1, 2).unflatten(2, (frames, height, width))
        if first_frame is not None:  # x_0 is known there, and with it the velocity
            known = (x[:, : config.in_channels, :1] - first_frame) / like(sigma, x)
            clip = _starting_with(known.to(clip.dtype), clip)
        heard = sounds.unflatten(2, (-1, _PITCHES)).transpose(1, 2).flatten(1)
        # what means nothing: x_0 is 0 there, and with it the velocity is known
        rest = torch.cat([heard, (unused / like(sigma, unused)).to(heard.dtype)], dim=1)
        return torch.cat([clip, rest.unflatten(1, (-1, frames, height, width))], dim=1)

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
        clip, sound, mask = pipeline.connectors(embeds, mask, padding_side=pipeline.tokenizer.padding_side)
        return {"prompt_embeds": clip, "prompt_audio_embeds": sound, "prompt_mask": mask.long()}

    def conditioning_shapes(
        self, config: Mapping[str, Any], tokens: int, latent: Sequence[int]
    ) -> dict[str, tuple[int, ...]]:
        own = "cross_attention_dim", "audio_cross_attention_dim"
        clip, sound = (config["caption_channels" if config["use_prompt_embeddings"] else name] for name in own)
        return {"prompt_embeds": (tokens, clip), "prompt_audio_embeds": (tokens, sound), "prompt_mask": (tokens,)}

    def image_shapes(self, pipeline: DiffusionPipeline, latent: Sequence[int]) -> dict[str, tuple[int, ...]]:
        return {"first_frame": (pipeline.transformer.config.in_channels, 1, *latent[2:])}

    @torch.no_grad()
    def encode_images(
        self, pipeline: DiffusionPipeline, images: Sequence[Image], height: int, width: int, frames: int
    ) -> dict[str, Tensor]:
        import numpy as np
        from diffusers.pipelines.ltx2 import pipeline_ltx2_image2video as stock
        from PIL import Image as images_of

        vae, found = pipeline.vae, []
        crf = stock.resolve_default_image_crf(pipeline.text_encoder)
        for image in images:
            try:  # clips were compressed when the network was trained, and pictures are for it
                seen = images_of.fromarray(stock.apply_image_conditioning_crf(np.array(image.convert("RGB")), crf))
            except ImportError as error:
                raise ValueError(f"{self.title} compresses pictures as clips are, which takes PyAV: {error}") from None
            pixels = pipeline.video_processor.preprocess(seen, height=height, width=width)
            latents = stock.retrieve_latents(vae.encode(pixels.to(vae.device, vae.dtype).unsqueeze(2)), None, "argmax")
            found.append(pipeline._normalize_latents(latents.float(), vae.latents_mean, vae.latents_std))
        return {"first_frame": torch.cat(found)}

    def guidance_arguments(self, scale: float, pipeline: type[DiffusionPipeline] | None = None) -> dict[str, float]:
        return {
            f"{side}{name}": value
            for side in ("", "audio_")
            for name, value in (
                ("guidance_scale", scale),
                ("stg_scale", 0.0),
                ("modality_scale", 1.0),
                ("guidance_rescale", 0.0),
            )
        }

    @torch.no_grad()
    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        latents = latents[:, : pipeline.transformer.config.in_channels].to(vae.device, vae.dtype)
        mean, std = (values.to(latents).view(1, -1, 1, 1, 1) for values in (vae.latents_mean, vae.latents_std))
        timestep = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        pixels: Tensor = vae.decode(latents * std / vae.config.scaling_factor + mean, timestep, return_dict=False)[0]
        return (pixels.float().transpose(1, 2) / 2 + 0.5).clamp(0, 1)

    def owns_lora(self, modules: Sequence[str]) -> bool:
        return any(_LORA.search(module) for module in modules)

    def native_weight_name(self, diffusers_name: str) -> str:
        raise ValueError(
            f"{diffusers_name!r}: ComfyUI's files of {self.architecture} hold the connectors of the text encoder too: "
            "use LoRA experts"
        )


def _starting_with(first_frame: Tensor, x: Tensor) -> Tensor:
    return torch.cat([first_frame, x[:, :, 1:]], dim=2)


def _length(frames: int, config: Mapping[str, Any]) -> int:
    """Of the latents of the sound of a clip with so many latent frames."""
    seconds = (1 + (frames - 1) * _FRAMES) / _FRAME_RATE
    pace: float = config["audio_sampling_rate"] / config["audio_hop_length"] / config["audio_scale_factor"]
    return round(seconds * pace)


def _without_rest(x: Tensor, numbers: int) -> tuple[Tensor, Tensor]:
    """Channels as the numbers that mean something, and those that do not: each (batch, numbers)."""
    flat = x.flatten(1)
    return flat[:, :numbers], flat[:, numbers:]

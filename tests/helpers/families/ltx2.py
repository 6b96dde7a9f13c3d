"""Tiny random pipelines of LTX-2."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.ltx2 import pipeline_ltx2_image2video as stock
from diffusers.utils import is_av_available
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from tests.helpers.families.case import Case
from tests.helpers.families.parts import quiet, spread
from tests.helpers.tiny import tokenizer

CHANNELS, SOUND = 8, 16
"""Features of the latents of clip and sound."""
TEXT, LAYERS = 16, 2


def _network() -> LTX2VideoTransformer3DModel:
    torch.manual_seed(0)
    return LTX2VideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=SOUND,
        audio_out_channels=SOUND,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=1,
        caption_channels=TEXT,
    ).eval()


def _autoencoders() -> dict[str, Any]:
    torch.manual_seed(0)
    clip = AutoencoderKLLTX2Video(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        upsample_factor=(1, 1, 1),
        scaling_factor=1.3,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    ).eval()
    sound = AutoencoderKLLTX2Audio(base_channels=SOUND, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=1).eval()
    for vae in (clip, sound):
        vae.latents_mean += 0.1 * torch.arange(len(vae.latents_mean))
        vae.latents_std += 0.2 * torch.arange(len(vae.latents_std))
    return {"vae": clip, "audio_vae": sound}


def _text_encoder() -> Gemma3ForConditionalGeneration:
    torch.manual_seed(0)
    text = {"vocab_size": 300, "hidden_size": TEXT, "intermediate_size": 16, "num_hidden_layers": LAYERS}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 16, "patch_size": 8}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config).eval()


def _compressed(image: np.ndarray, crf: int) -> np.ndarray:
    """In the place of H.264, for which diffusers takes the package av."""
    file = BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=100 - crf)
    return np.array(Image.open(file))


if not is_av_available():
    stock.apply_image_conditioning_crf = _compressed


def ltx2(kind: type[DiffusionPipeline] = LTX2Pipeline) -> Any:
    """Text to a clip with sound, or an image to one by ``kind``."""
    network = _network()
    spread(network, 0.1)
    torch.manual_seed(0)
    connector = {"num_attention_heads": 2, "attention_head_dim": TEXT // 2, "num_layers": 1}
    connector["num_learnable_registers"] = 8
    connectors = LTX2TextConnectors(
        caption_channels=TEXT,
        text_proj_in_factor=LAYERS + 1,
        **{f"{side}_connector_{name}": value for side in ("video", "audio") for name, value in connector.items()},
    )
    return quiet(
        kind(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            text_encoder=_text_encoder(),
            tokenizer=tokenizer(),
            connectors=connectors.eval(),
            transformer=network,
            vocoder=LTX2Vocoder(in_channels=128, hidden_channels=32).eval(),
            **_autoencoders(),
        )
    )


def _joined(pipeline: Any, latents: tuple[Tensor, Tensor], size: tuple[int, int, int]) -> Tensor:
    """The clip's latents and, in further channels, those of the sound; the call has taken their statistics off."""
    clip, sound = latents
    vae, audio = pipeline.vae, pipeline.audio_vae
    clip = pipeline._normalize_latents(clip, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    tokens = pipeline._pack_audio_latents(sound)
    tokens = pipeline._normalize_audio_latents(tokens, audio.latents_mean, audio.latents_std)
    numbers = pipeline._unpack_audio_latents(tokens, sound.shape[2], sound.shape[3]).flatten(1)
    rest = -numbers.shape[1] % clip[0, 0].numel()
    return torch.cat([clip, functional.pad(numbers, (0, rest)).unflatten(1, (-1, *clip.shape[2:]))], dim=1)


_COMMON = Case(ltx2, (64, 160, 9), (1, 20, CHANNELS), velocity=None, tokens=24, unpacked=_joined, outputs=2)
_FROM_PICTURE = replace(_COMMON, build=lambda: ltx2(LTX2ImageToVideoPipeline), decoded_within=5e-5)
CASES = {"ltx2": _COMMON, "ltx2_image_to_video": _FROM_PICTURE}
"""Of the 8 channels for the sound, which has 9 * 16 numbers, the last 16 numbers mean nothing."""

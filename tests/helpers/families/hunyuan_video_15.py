"""Tiny random pipelines of HunyuanVideo 1.5."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15ByT5TextProjection
from torch import Tensor, nn
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.helpers.families.case import Case, plain
from tests.helpers.families.parts import quiet, qwen_tokenizer, spread, t5

CHANNELS = 4
TOKENS, TEXT = 64, 32
"""Of a prompt; features of quoted texts, which no released network has so few of."""


def _narrow(make: Any) -> Any:
    """The projection of quoted texts with 16 features inside; 2048, a constant of diffusers, take most of the time."""

    def of_tiny_texts(self: nn.Module, in_features: int, hidden_size: int, out_features: int) -> None:
        make(self, in_features, 16 if in_features == TEXT else hidden_size, out_features)

    return of_tiny_texts


HunyuanVideo15ByT5TextProjection.__init__ = _narrow(HunyuanVideo15ByT5TextProjection.__init__)


def _tokenizer() -> Qwen2Tokenizer:
    """What stands before the prompt has the length of the real template, which the pipeline cuts off."""
    built = qwen_tokenizer()
    built.chat_template = "{{ '-' * 108 }}{% for m in messages %}{% if m['role'] == 'user' %}{{m['content']}}."
    built.chat_template += "{% endif %}{% endfor %}"
    return built


def hunyuan_video_15(image: bool = False) -> Any:
    """Text to video, or image to video with ``image``; guidance is a component."""
    torch.manual_seed(0)
    network = HunyuanVideo15Transformer3DModel(
        in_channels=2 * CHANNELS + 1,
        out_channels=CHANNELS,
        num_attention_heads=1,
        attention_head_dim=16,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=TEXT,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
        task_type="i2v" if image else "t2v",
        target_size=20,
    ).eval()
    spread(network, 0.05)
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        scaling_factor=1.3,
    ).eval()
    text = Qwen2_5_VLTextConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
        eos_token_id=1,
        max_position_embeddings=2048,
        rope_parameters={"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
    )
    pipeline = quiet(
        (HunyuanVideo15ImageToVideoPipeline if image else HunyuanVideo15Pipeline)(
            text_encoder=Qwen2_5_VLTextModel(text).eval(),
            tokenizer=_tokenizer(),
            transformer=network,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            text_encoder_2=t5(),
            tokenizer_2=ByT5Tokenizer(),
            guider=ClassifierFreeGuidance(guidance_scale=6.0),
            **(_image_encoder() if image else {}),
        )
    )
    pipeline.tokenizer_max_length, pipeline.vision_num_semantic_tokens = (
        TOKENS,
        1,
    )  # padding, which takes most of the time
    return pipeline


def _image_encoder() -> dict[str, Any]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = SiglipVisionConfig(**sizes, image_size=16, patch_size=8, vision_use_head=False)
    side = {"height": 16, "width": 16}
    return {
        "image_encoder": SiglipVisionModel(config).eval(),
        "feature_extractor": SiglipImageProcessorPil(size=side),
    }


def _beside_picture(network: nn.Module, args: Any, kwargs: dict[str, Any], x: Tensor, timestep: Tensor) -> Tensor:
    states = torch.cat([x, kwargs["hidden_states"][:, x.shape[1] :]], dim=1)
    return plain(network, args, kwargs, states, timestep)


_COMMON = Case(
    hunyuan_video_15,
    (16, 24, 5),
    (1, CHANNELS, 2, 4, 6),
    _beside_picture,
    prompt='a panda reads "no"',
    tokens=TOKENS,
    picture_size=(48, 32),
)
CASES = {
    "hunyuan_video_15": _COMMON,
    "hunyuan_video_15_image_to_video": replace(_COMMON, build=lambda: hunyuan_video_15(image=True)),
}

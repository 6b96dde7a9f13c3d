"""Tiny random pipelines of Qwen-Image and Qwen-Image-Edit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import (
    ProcessorMixin,  # noqa: F401 - diffusers looks for it here to load the processor of this module
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from tests.helpers.families.case import Case, beside_tokens, thousandth
from tests.helpers.families.parts import quiet, qwen_tokenizer, unpacked

TOKENS = 500
"""Enough for the template around a prompt, one token for each byte."""


def _qwen_text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    token = qwen_tokenizer().convert_tokens_to_ids
    scaling = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "rope_parameters": scaling | {"rope_theta": 1e6},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def _qwen_parts(levels: int = 3, residual_blocks: int = 1, **changes: Any) -> dict[str, Any]:
    """levels: of the autoencoder, with so many blocks; each but the first halves the sides. changes: of the network."""
    torch.manual_seed(0)
    channels = 4
    vae = AutoencoderKLQwenImage(
        base_dim=2,
        z_dim=channels,
        dim_mult=[1] * levels,
        num_res_blocks=residual_blocks,
        temperal_downsample=[False] * (levels - 1),
        latents_mean=[0.1 * i for i in range(channels)],
        latents_std=[1.0 + 0.2 * i for i in range(channels)],
    ).eval()
    network = QwenImageTransformer2DModel(
        in_channels=4 * channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        **changes,
    ).eval()
    return {
        "tokenizer": qwen_tokenizer(),
        "text_encoder": _qwen_text_encoder(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": vae,
        "transformer": network,
    }


class PictureProcessor(Qwen2VLProcessor):
    """Without its part for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return object if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        self.image_processor.save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> PictureProcessor:
        return cls(Qwen2VLImageProcessorPil.from_pretrained(folder), Qwen2Tokenizer.from_pretrained(folder))


_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{% if m['content'] is string %}{{m['content']}}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{c['text']}}{% else %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def picture_processor() -> PictureProcessor:
    """A processor of pictures up to 56x56."""
    pictures = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)
    return PictureProcessor(pictures, qwen_tokenizer(), chat_template=_TEMPLATE)


def qwen_image() -> QwenImagePipeline:
    """Text to image, prompts of different lengths."""
    return quiet(QwenImagePipeline(**_qwen_parts()))


def qwen_image_to_image() -> QwenImageImg2ImgPipeline:
    """Starts midway, from a picture."""
    return quiet(QwenImageImg2ImgPipeline(**_qwen_parts()))


def qwen_image_edit() -> QwenImageEditPipeline:
    """The text encoder sees the picture, and its latents follow the sample's tokens.

    Edit pipelines scale every picture to a million pixels: the latents are 32 times smaller, the autoencoder is short.
    """
    return quiet(QwenImageEditPipeline(**_qwen_parts(levels=6, residual_blocks=0), processor=picture_processor()))


def qwen_image_edit_plus() -> QwenImageEditPlusPipeline:
    """As Qwen-Image-Edit-2511: another template, and the given picture's tokens have a timestep of their own."""
    parts = _qwen_parts(levels=6, residual_blocks=0, zero_cond_t=True)
    return quiet(QwenImageEditPlusPipeline(**parts, processor=picture_processor()))


_EDITS = Case(
    qwen_image_edit,
    (64, 128, 1),
    (1, 2, 16),
    beside_tokens,
    tokens=TOKENS,
    unpacked=unpacked,
    picture_size=(64, 32),
    moved=0.01,
)
CASES = {
    "qwen_image": Case(qwen_image, (32, 48, 1), (1, 24, 16), thousandth, tokens=TOKENS, unpacked=unpacked),
    "qwen_image_edit": _EDITS,
    "qwen_image_edit_plus": replace(_EDITS, build=qwen_image_edit_plus),
}

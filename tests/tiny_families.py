"""Tiny random pipelines of the other model families, of the real diffusers and transformers classes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3Model,
)

from tests.tiny import LATENT_CHANNELS, autoencoder, text_encoder, tokenizer, transformer

IMAGE_FEATURES = 20


def picture(seed: int = 0, size: tuple[int, int] = (24, 40)) -> Image.Image:
    """Random colours in large squares."""
    pixels = torch.randint(256, (size[1] // 8, size[0] // 8, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.byte().numpy()).resize(size, Image.Resampling.NEAREST)


def _quiet(pipeline: DiffusionPipeline) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _shared() -> dict[str, Any]:
    return {
        "tokenizer": tokenizer(),
        "text_encoder": text_encoder(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
    }


def wan_two_networks() -> WanPipeline:
    """Wan 2.2 text to video, A14B: two networks, high noise at sigma >= 0.875."""
    networks = {"transformer": transformer(0), "transformer_2": transformer(1)}
    return _quiet(WanPipeline(**_shared(), **networks, vae=autoencoder(), boundary_ratio=0.875))


def wan_image_two_networks() -> WanImageToVideoPipeline:
    """Wan 2.2 image to video, A14B: two networks, high noise at sigma >= 0.9."""
    channels = 2 * LATENT_CHANNELS + 4
    networks = {
        "transformer": transformer(0, in_channels=channels),
        "transformer_2": transformer(1, in_channels=channels),
    }
    return _quiet(WanImageToVideoPipeline(**_shared(), **networks, vae=_spread_autoencoder(), boundary_ratio=0.9))


def wan_image_clip() -> WanImageToVideoPipeline:
    """Wan 2.1 image to video: one network that also sees CLIP's features of the image."""
    torch.manual_seed(0)
    sizes = {"hidden_size": IMAGE_FEATURES, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    network = transformer(0, in_channels=2 * LATENT_CHANNELS + 4, added_kv_proj_dim=24, image_dim=IMAGE_FEATURES)
    return _quiet(
        WanImageToVideoPipeline(
            **_shared(),
            transformer=network,
            vae=_spread_autoencoder(),
            image_encoder=CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8)).eval(),
            image_processor=CLIPImageProcessorPil(crop_size=16, size=16),
        )
    )


def wan_5b(kind: type[DiffusionPipeline] = WanPipeline) -> Any:
    """Wan 2.2 TI2V 5B: 48 channels, 16 pixels, a timestep for each token; text or image to video by ``kind``."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3,
        decoder_base_dim=3,
        z_dim=48,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.1] * 48,
        latents_std=[0.7] * 48,
    ).eval()
    network = transformer(0, in_channels=48, out_channels=48)
    return _quiet(kind(**_shared(), transformer=network, vae=vae, expand_timesteps=True))


def _spread_autoencoder() -> AutoencoderKLWan:
    """With statistics that are not 0 and 1, so that forgetting them shows."""
    vae = autoencoder()
    vae.register_to_config(latents_mean=[0.1 * i for i in range(LATENT_CHANNELS)])
    vae.register_to_config(latents_std=[1.0 + 0.2 * i for i in range(LATENT_CHANNELS)])
    return vae


def _qwen_tokenizer() -> Qwen2Tokenizer:
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special = ("<|endoftext|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    vocabulary |= {token: 300 + i for i, token in enumerate(special)}
    built = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    built.add_special_tokens({"additional_special_tokens": list(special[1:])})
    return built


def _qwen_parts() -> dict[str, Any]:
    torch.manual_seed(0)
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
        image_token_id=301,
        video_token_id=302,
        vision_start_token_id=303,
        vision_end_token_id=304,
    )
    channels = 4
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
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
    ).eval()
    return {
        "tokenizer": _qwen_tokenizer(),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(config).eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": vae,
        "transformer": network,
    }


class _PictureProcessor(Qwen2VLProcessor):
    """Without its part for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return object if argument is None else super().check_argument_for_proper_class(argument_name, argument)


def qwen_image() -> QwenImagePipeline:
    """Text to image, prompts of different lengths."""
    return _quiet(QwenImagePipeline(**_qwen_parts()))


def qwen_image_edit() -> QwenImageEditPipeline:
    """Image to image: the text encoder sees the image, and its latents follow the sample's tokens."""
    parts = _qwen_parts()
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)
    return _quiet(QwenImageEditPipeline(**parts, processor=_PictureProcessor(images, parts["tokenizer"])))


def z_image() -> ZImagePipeline:
    """Text to image: prompts of different lengths in a list, the reversed timestep, the negative velocity."""
    torch.manual_seed(0)
    network = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    ).eval()
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[4, 4, 4, 4],
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    ).eval()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 512}
    text = Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512)
    tokens = _qwen_tokenizer()
    tokens.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return _quiet(
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=Qwen3Model(text).eval(),
            tokenizer=tokens,
            transformer=network,
        )
    )

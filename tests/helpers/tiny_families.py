"""Tiny random pipelines of every family, of the real diffusers and transformers classes; equal weights every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanImageToVideoPipeline,
    WanPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    ProcessorMixin,  # noqa: F401 - diffusers looks for it here to load the processor of this module
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from tests.helpers.tiny import LATENT_CHANNELS, autoencoder, text_encoder, tokenizer, transformer

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


def wan_image() -> WanImageToVideoPipeline:
    """Image to video with one network that takes the image's latents only."""
    network = transformer(0, in_channels=2 * LATENT_CHANNELS + 4)
    return _quiet(WanImageToVideoPipeline(**_shared(), transformer=network, vae=_spread_autoencoder()))


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


# --- Qwen-Image ---------------------------------------------------------------

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def qwen_tokenizer() -> Qwen2Tokenizer:
    """One token for each byte, and the special tokens that templates use."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *_SPECIAL, "<|video_pad|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    built = Qwen2Tokenizer(vocab=vocabulary, merges=[], extra_special_tokens=list(tokens[-6:]))
    built.chat_template = (
        "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n"
    )
    return built


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


def _qwen_parts(levels: int = 3, **changes: Any) -> dict[str, Any]:
    """levels: of the autoencoder; each but the first halves the sides. changes: of the network."""
    torch.manual_seed(0)
    channels = 4
    vae = AutoencoderKLQwenImage(
        base_dim=2,
        z_dim=channels,
        dim_mult=[1] * levels,
        num_res_blocks=1,
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


def _picture_processor() -> PictureProcessor:
    return PictureProcessor(Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56), qwen_tokenizer())


def qwen_image() -> QwenImagePipeline:
    """Text to image, prompts of different lengths."""
    return _quiet(QwenImagePipeline(**_qwen_parts()))


def qwen_image_to_image() -> QwenImageImg2ImgPipeline:
    """Starts midway, from a picture."""
    return _quiet(QwenImageImg2ImgPipeline(**_qwen_parts()))


def qwen_image_edit() -> QwenImageEditPipeline:
    """The text encoder sees the picture, and its latents follow the sample's tokens.

    Edit pipelines scale every picture to a million pixels: the latents are 32 times smaller.
    """
    return _quiet(QwenImageEditPipeline(**_qwen_parts(levels=6), processor=_picture_processor()))


def qwen_image_edit_plus() -> QwenImageEditPlusPipeline:
    """As Qwen-Image-Edit-2511: another template, and the given picture's tokens have a timestep of their own."""
    parts = _qwen_parts(levels=6, zero_cond_t=True)
    return _quiet(QwenImageEditPlusPipeline(**parts, processor=_picture_processor()))


# --- others -------------------------------------------------------------------


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
    with torch.no_grad():  # made with torch.empty
        network.x_pad_token.zero_()
        network.cap_pad_token.zero_()
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 4],
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
    return _quiet(
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=Qwen3Model(text).eval(),
            tokenizer=qwen_tokenizer(),
            transformer=network,
        )
    )


def _clip(kind: type[Any]) -> Any:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=1,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return kind(config).eval()


def _t5() -> Any:
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).eval()


def _autoencoder_kl(channels: int) -> Any:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()


def flux(guidance_embeds: bool = False) -> FluxPipeline:
    """Text to image with two text encoders."""
    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    ).eval()
    return _quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=_autoencoder_kl(1),
            text_encoder=_clip(CLIPTextModel),
            tokenizer=tokenizer(),
            text_encoder_2=_t5(),
            tokenizer_2=tokenizer(),
            transformer=network,
        )
    )


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    """Text to image with three text encoders."""
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    ).eval()
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=network,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=_autoencoder_kl(4),
            text_encoder=_clip(CLIPTextModelWithProjection),
            tokenizer=tokenizer(),
            text_encoder_2=_clip(CLIPTextModelWithProjection),
            tokenizer_2=tokenizer(),
            text_encoder_3=_t5(),
            tokenizer_3=tokenizer(),
        )
    )

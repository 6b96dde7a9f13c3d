"""What tiny pipelines of several families share."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTextConfig, Qwen2Tokenizer, T5Config, T5EncoderModel


def picture(seed: int = 0, size: tuple[int, int] = (24, 40)) -> Image.Image:
    """Random colours in large squares."""
    pixels = torch.randint(256, (size[1] // 8, size[0] // 8, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.byte().numpy()).resize(size, Image.Resampling.NEAREST)


def quiet(pipeline: DiffusionPipeline) -> Any:
    """The pipeline, without its progress bar."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def use_all_colours(vae: Any) -> None:
    """Pixels of a random autoencoder that reach from black to white."""
    for name, parameter in vae.decoder.conv_out.named_parameters():
        if name.endswith("weight"):
            parameter.mul_(20)


@torch.no_grad()
def spread(network: nn.Module | None, strength: float) -> None:
    """Weights larger than at the start of training, so that every input matters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters() if network is not None else ():
        parameter.add_(strength * torch.randn(parameter.shape, generator=generator))


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


def clip(kind: type[Any]) -> Any:
    """A text encoder of the class ``kind``."""
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


def t5() -> T5EncoderModel:
    """A text encoder."""
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).eval()


def autoencoder_kl(channels: int, levels: int = 1) -> AutoencoderKL:
    """levels: each but the first halves the sides."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[4] * levels,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()


def unpacked(pipeline: Any, latents: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Latents out of tokens."""
    return pipeline._unpack_latents(latents, *size[:2], pipeline.vae_scale_factor)

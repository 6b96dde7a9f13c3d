"""What tiny pipelines of several families share."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tokenizers import pre_tokenizers
from torch import nn
from transformers import Qwen2Tokenizer


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

"""ImageReward (Xu et al. 2023, arXiv 2304.05977): what people would prefer for a prompt, with weights of the user."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MEAN, _SCALE = 0.16717362830052426, 1.0333394966054072
"""Mean and deviation of raw rewards, which the published package removes."""
_CHANNEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CHANNEL_SCALE = (0.26862954, 0.26130258, 0.27577711)
_TOKENS = 35
"""Prompts are cut and padded to this length, as the network was trained."""
_HEAD = 64
"""Width of an attention head in both networks."""
_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "norm.": "post_layernorm.",
}
_BLOCK = {"norm1.": "layer_norm1.", "norm2.": "layer_norm2.", "attn.qkv.": "self_attn.qkv."}
_BLOCK |= {"attn.proj.": "self_attn.projection.", "mlp.": "mlp."}


class ImageReward(nn.Module):
    """BLIP that reads the prompt while it looks at the picture, and a reward of what it read.

    Neither the weights nor the vocabulary are part of this project or downloaded by it. Sizes are told from the
    weights; the networks are those of transformers.

    Args:
        weights: The state dict of ImageReward.pt.
        tokenizer: The tokenizer of bert-base-uncased.

    Raises:
        ValueError: If the state dict is that of another network.
    """

    FILES = ("ImageReward.pt", "vocab.txt")
    """The files of a folder that decide the rewards."""

    def __init__(self, weights: Mapping[str, Tensor], tokenizer: Any) -> None:
        super().__init__()
        vision = {name.removeprefix("blip.visual_encoder."): w for name, w in weights.items() if "visual" in name}
        text = {name.removeprefix("blip.text_encoder."): w for name, w in weights.items() if "text_encoder" in name}
        head = {name.removeprefix("mlp."): w for name, w in weights.items() if name.startswith("mlp.")}
        self.tokenizer = tokenizer
        try:
            self.vision = _vision_network(vision)
            self.text = _text_network(text)
            self.head = _head(head)
        except (KeyError, RuntimeError, ValueError, IndexError) as error:
            found = " ".join(str(error).split())[:300]
            raise ValueError(f"expected the weights of ImageReward v1.0, found others: {found}") from None
        if len(tokenizer) > self.text.config.vocab_size:
            raise ValueError(
                f"expected the vocabulary of bert-base-uncased, {self.text.config.vocab_size - 2} tokens, found one of "
                f"{len(tokenizer)}"
            )
        self.eval().requires_grad_(False)

    @classmethod
    def from_folder(cls, folder: Path) -> ImageReward:
        """Load the published files; nothing but tensors is unpickled.

        Args:
            folder: With ImageReward.pt, and the tokenizer of bert-base-uncased (vocab.txt, tokenizer_config.json).

        Returns:
            The network.

        Raises:
            ValueError: If a file is missing or is another network's.
        """
        from transformers import AutoTokenizer, BertTokenizer

        file, vocabulary = (folder / name for name in cls.FILES)
        missing = [path.name for path in (file, vocabulary) if not path.is_file()]
        if missing:
            raise ValueError(
                f"expected ImageReward.pt (zai-org/ImageReward) and vocab.txt (google-bert/bert-base-uncased) in "
                f"{folder}, found no {' and no '.join(missing)}"
            )
        named = (folder / "tokenizer_config.json").is_file()
        tokenizer = (
            AutoTokenizer.from_pretrained(folder, local_files_only=True)
            if named
            else BertTokenizer(vocab=str(vocabulary), do_lower_case=True)
        )
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise ValueError(f"expected tensors by name in {file}, found something else")
        return cls(weights, tokenizer)

    @torch.no_grad()
    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Reward pictures for what a prompt asked for.

        Args:
            pixels: Pictures of shape (count, 3, height, width), in [0, 1].
            prompts: The prompt of each.

        Returns:
            Rewards of shape (count,), in float32; over the data of ImageReward their mean is 0, their deviation 1.
        """
        device = self.text.device
        seen = self.vision(self._prepared(pixels.to(device))).last_hidden_state
        words = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt"
        ).to(device)
        read = self.text(
            words.input_ids,
            attention_mask=words.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device),
        ).last_hidden_state
        rewards: Tensor = self.head(read[:, 0].float())[:, 0]
        return (rewards - _MEAN) / _SCALE

    def _prepared(self, pixels: Tensor) -> Tensor:
        """The middle of the picture, scaled and normalised as the network was trained."""
        side: int = self.vision.config.image_size
        height, width = pixels.shape[-2:]
        short = min(height, width)
        size = (int(side * height / short), int(side * width / short))
        scaled = F.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (round((n - side) / 2) for n in size)
        mean, scale = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (_CHANNEL_MEAN, _CHANNEL_SCALE))
        return (scaled[..., top : top + side, left : left + side] - mean) / scale


def _vision_network(weights: Mapping[str, Tensor]) -> Any:
    from transformers import BlipVisionConfig, BlipVisionModel

    width, patch = weights["cls_token"].shape[-1], weights["patch_embed.proj.weight"].shape[-1]
    side = math.isqrt(weights["pos_embed"].shape[1] - 1)
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        num_attention_heads=width // _HEAD,
        image_size=side * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    network = BlipVisionModel(config)
    network.load_state_dict({_in_transformers(name): value for name, value in weights.items()})
    return network


def _in_transformers(name: str) -> str:
    """The name of a weight of the image network in transformers."""
    if name.startswith("blocks."):
        _, index, rest = name.split(".", 2)
        own, theirs = next((pair for pair in _BLOCK.items() if rest.startswith(pair[0])), ("", ""))
        return f"encoder.layers.{index}.{theirs}{rest.removeprefix(own)}"
    own, theirs = next((pair for pair in _VISION.items() if name.startswith(pair[0])), ("", ""))
    return theirs + name.removeprefix(own)


def _text_network(weights: Mapping[str, Tensor]) -> Any:
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer.")),
        num_attention_heads=width // _HEAD,
        max_position_embeddings=weights["embeddings.position_embeddings.weight"].shape[0],
    )
    network = BlipTextModel(config, add_pooling_layer=False)
    network.load_state_dict({name: w for name, w in weights.items() if not name.endswith("position_ids")})
    return network


def _head(weights: Mapping[str, Tensor]) -> nn.Module:
    """The layers of the reward, which have nothing between them but dropout."""
    places = sorted({int(name.split(".")[1]) for name in weights})
    layers = []
    for place in places:
        weight, bias = weights[f"layers.{place}.weight"], weights[f"layers.{place}.bias"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    if layers[-1].out_features != 1:
        raise ValueError(f"the last layer gives {layers[-1].out_features} numbers instead of one reward")
    return nn.Sequential(*layers)

"""Tiny random weights in the form of ImageReward.pt."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

WORDS = ("a", "panda", "fox", "on", "red", "ice")
_VISION, _TEXT, _VOCABULARY = 128, 64, 102


def shapes() -> dict[str, tuple[int, ...]]:
    """Name to shape: pictures of 48x48 pixels in patches of 16, two layers in each network."""
    linear: dict[str, tuple[int, int]] = {}
    norms: dict[str, int] = {"visual_encoder.norm": _VISION, "text_encoder.embeddings.LayerNorm": _TEXT}
    for i in range(2):
        block, layer = f"visual_encoder.blocks.{i}", f"text_encoder.encoder.layer.{i}"
        norms |= {f"{block}.norm1": _VISION, f"{block}.norm2": _VISION}
        linear |= {f"{block}.attn.qkv": (3 * _VISION, _VISION), f"{block}.attn.proj": (_VISION, _VISION)}
        linear |= {f"{block}.mlp.fc1": (2 * _VISION, _VISION), f"{block}.mlp.fc2": (_VISION, 2 * _VISION)}
        for attention, read in (("attention", _TEXT), ("crossattention", _VISION)):
            linear[f"{layer}.{attention}.self.query"] = (_TEXT, _TEXT)
            linear |= {f"{layer}.{attention}.self.{part}": (_TEXT, read) for part in ("key", "value")}
            linear[f"{layer}.{attention}.output.dense"] = (_TEXT, _TEXT)
            norms[f"{layer}.{attention}.output.LayerNorm"] = _TEXT
        linear |= {f"{layer}.intermediate.dense": (96, _TEXT), f"{layer}.output.dense": (_TEXT, 96)}
        norms[f"{layer}.output.LayerNorm"] = _TEXT
    found: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, _VISION),
        "blip.visual_encoder.pos_embed": (1, 10, _VISION),
        "blip.visual_encoder.patch_embed.proj.weight": (_VISION, 3, 16, 16),
        "blip.visual_encoder.patch_embed.proj.bias": (_VISION,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (_VOCABULARY, _TEXT),
        "blip.text_encoder.embeddings.position_embeddings.weight": (40, _TEXT),
        "blip.vision_proj.weight": (8, _VISION),
        "blip.text_proj.weight": (8, _TEXT),
    }
    for name, (after, before) in linear.items():
        found |= {f"blip.{name}.weight": (after, before), f"blip.{name}.bias": (after,)}
    found |= {f"blip.{name}.{part}": (width,) for name, width in norms.items() for part in ("weight", "bias")}
    for place, (after, before) in {0: (32, _TEXT), 2: (8, 32), 4: (1, 8)}.items():
        found |= {f"mlp.layers.{place}.weight": (after, before), f"mlp.layers.{place}.bias": (after,)}
    return found


def weights() -> dict[str, Tensor]:
    """The same random weights every time, and the positions that the published file carries."""
    generator = torch.Generator().manual_seed(0)
    found = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in sorted(shapes().items())}
    found |= {name: 1 + value for name, value in found.items() if "orm" in name and name.endswith(".weight")}
    return found | {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}


def save_image_reward(folder: Path) -> Path:
    """Write the files that a user downloads."""
    torch.save(weights(), folder / "ImageReward.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    words += [f"word{i}" for i in range(_VOCABULARY - 2 - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder

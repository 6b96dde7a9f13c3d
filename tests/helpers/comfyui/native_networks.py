"""Tiny random networks of ComfyUI's own classes, for families whose layout in diffusers is another one."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.helpers.comfyui.tiny_models import WAN_WIDTH
from tests.helpers.tiny import TEXT_FEATURES, randn

WIDTH, TEXT = 128, 16
"""Of networks whose heads ComfyUI takes to be 128 wide: one head."""


@dataclass(frozen=True)
class Native:
    """A network's class, the sizes it is made with, and whether ComfyUI reads them from the file's metadata."""

    module: str
    name: str
    sizes: dict[str, Any]
    says_sizes: bool = True
    latent_channels: int = 16
    text: int = TEXT_FEATURES
    extra: dict[str, Any] = field(default_factory=dict)
    """What else the prompts of this family carry."""


_WAN = {"dim": WAN_WIDTH, "ffn_dim": 32, "freq_dim": 32, "text_dim": TEXT_FEATURES, "num_heads": 2, "num_layers": 2}
_CONNECTORS = {"connector_attention_head_dim": 8, "connector_num_attention_heads": 2, "connector_num_layers": 1}
_FLUX2 = {"in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": TEXT, "hidden_size": WIDTH}
_FLUX2 |= {"mlp_ratio": 3.0, "num_heads": 1, "depth": 1, "depth_single_blocks": 1, "axes_dim": [32] * 4, "theta": 2000}
_FLUX2 |= {"patch_size": 1, "qkv_bias": False, "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True}
_FLUX2 |= {"ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0}
_HUNYUAN = {"in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "vec_in_dim": None, "hidden_size": WIDTH}
_HUNYUAN |= {"context_in_dim": TEXT, "mlp_ratio": 4.0, "num_heads": 1, "depth": 1, "depth_single_blocks": 0}
_HUNYUAN |= {"axes_dim": [16, 56, 56], "theta": 256, "qkv_bias": True, "guidance_embed": False, "meanflow": False}
_HUNYUAN |= {"byt5": True, "use_cond_type_embedding": True, "vision_in_dim": 1152, "meanflow_sum": True}
_LTX2 = {"cross_attention_dim": 32, "attention_head_dim": 16, "num_attention_heads": 2, "caption_channels": TEXT}
_LTX2 |= {"audio_cross_attention_dim": 16, "audio_attention_head_dim": 8, "audio_num_attention_heads": 2}
_LTX2 |= {"num_layers": 1, **_CONNECTORS}

NATIVE = {
    "vace": Native("comfy.ldm.wan.model", "VaceWanModel", {**_WAN, "vace_layers": 1, "vace_in_dim": 96}),
    "s2v": Native("comfy.ldm.wan.model", "WanModel_S2V", {**_WAN, "audio_dim": 8, "audio_inject_layers": [0]}),
    "animate": Native(
        "comfy.ldm.wan.model_animate", "AnimateWanModel", {**_WAN, "num_layers": 5, "in_dim": 36, "out_dim": 16}
    ),
    "ltx2": Native("comfy.ldm.lightricks.av_model", "LTXAVModel", _LTX2, latent_channels=128, text=2 * TEXT),
    "hunyuan15": Native(
        "comfy.ldm.hunyuan_video.model",
        "HunyuanVideo",
        _HUNYUAN,
        says_sizes=False,
        latent_channels=32,
        text=TEXT,
        extra={"conditioning_byt5small": randn(1, 4, 1472, seed=3), "pooled_output": None},
    ),
    "flux2": Native(
        "comfy.ldm.flux.model",
        "Flux",
        {**_FLUX2, "guidance_embed": True},
        says_sizes=False,
        latent_channels=128,
        text=TEXT,
    ),
    "flux2-klein": Native(
        "comfy.ldm.flux.model",
        "Flux",
        {**_FLUX2, "guidance_embed": False},
        says_sizes=False,
        latent_channels=128,
        text=TEXT,
    ),
}
"""Families by a short name."""


def native_network(family: str, seed: int) -> Any:
    """A MODEL; each seed is another network."""
    import comfy.ops
    import comfy.sd

    native = NATIVE[family]
    kind = getattr(importlib.import_module(native.module), native.name)
    with torch.device("meta"):
        network = kind(**native.sizes, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    state = {
        name: randn(*value.shape, seed=1000 * seed + n) / (math.sqrt(value[0].numel()) if value.ndim > 1 else 1)
        for n, (name, value) in enumerate(network.state_dict().items())
    }
    metadata = {"config": json.dumps({"transformer": native.sizes})} if native.says_sizes else None
    model = comfy.sd.load_diffusion_model_state_dict(state, metadata=metadata)
    assert type(model.model.diffusion_model) is kind
    return model


def prompts(family: str, seed: int) -> list[Any]:
    """As the text encoders of the family give it: 8 tokens."""
    native = NATIVE[family]
    return [[randn(1, 8, native.text, seed=seed), dict(native.extra)]]


def empty(family: str, *shape: int) -> dict[str, Tensor]:
    """An empty latent of this shape."""
    return {"samples": torch.zeros(1, NATIVE[family].latent_channels, *shape)}

"""FLUX.1, FLUX.2, Chroma, Stable Diffusion 3, LTX-2: LoRA experts land on their parts of the weights.

The networks are ComfyUI's own classes in tiny sizes. Where each layer of diffusers lies in them is told by the family,
which reads files in the original layout by the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pdmd_core.experts import lora_to_file
from pdmd_core.families import family
from tests.helpers.comfyui.phased_models import with_lora
from tests.helpers.families.chroma import chroma
from tests.helpers.families.flux import flux
from tests.helpers.families.flux2 import flux2
from tests.helpers.families.ltx2 import ltx2
from tests.helpers.families.stable_diffusion_3 import stable_diffusion_3
from tests.helpers.tiny_pipelines import random_lora

RANK, ALPHA = 4, 6.0
FLUX = {
    "in_channels": 4,
    "out_channels": 4,
    "context_in_dim": 32,
    "hidden_size": 32,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [4, 4, 8],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "txt_ids_dims": [],
}
FLUX2 = FLUX | {
    "in_channels": 16,
    "out_channels": 16,
    "context_in_dim": 48,
    "mlp_ratio": 3.0,
    "axes_dim": [4, 4, 4, 4],
    "theta": 2000,
    "patch_size": 1,
    "qkv_bias": False,
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "vec_in_dim": None,
    "guidance_embed": True,
}
SD3 = {
    "in_channels": 4,
    "depth": 2,
    "num_blocks": 2,
    "patch_size": 2,
    "pos_embed_scaling_factor": None,
    "input_size": None,
    "adm_in_channels": 64,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}},
    "num_patches": 1024,
    "pos_embed_max_size": 32,
    "qk_norm": "rms",
    "x_block_self_attn_layers": [0],
}
LTX2 = {
    "image_model": "ltxav",
    "in_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "audio_in_channels": 16,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 1,
    "caption_channels": 16,
    "connector_num_attention_heads": 1,
    "connector_attention_head_dim": 8,
}
CASES: dict[str, tuple[Callable[[], Any], str, dict[str, Any]]] = {
    "flux": (flux, "Flux", FLUX | {"image_model": "flux", "vec_in_dim": 32, "guidance_embed": True}),
    "flux2": (flux2, "Flux2", FLUX2 | {"image_model": "flux2"}),
    "chroma": (
        chroma,
        "Chroma",
        FLUX
        | {"image_model": "chroma", "in_dim": 8, "out_dim": 32, "hidden_dim": 16, "n_layers": 1, "vec_in_dim": None},
    ),
    "ltx2": (ltx2, "LTXAV", LTX2),
    "stable_diffusion_3": (
        lambda: stable_diffusion_3(attention_head_dim=64, num_attention_heads=2, caption_projection_dim=128),
        "SD3",
        SD3,
    ),
}
"""Family to its pipeline in diffusers, and ComfyUI's class with the settings of the same network."""


@pytest.mark.parametrize("name", CASES)
def test_lora_experts_change_what_they_change_in_diffusers(pack, name: str) -> None:
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    build, kind, settings = CASES[name]
    found, cpu = family(name), torch.device("cpu")
    config = getattr(comfy.supported_models, kind)(settings)
    config.set_inference_dtype(torch.float32, None)
    torch.manual_seed(0)
    model = comfy.model_patcher.ModelPatcher(config.get_model({}), load_device=cpu, offload_device=cpu)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
        for buffer in model.model.buffers():  # some are made with torch.empty
            buffer.zero_()
    lora = random_lora(build().transformer, RANK, 1, found.lora_targets)
    patched = with_lora(pack, model, lora_to_file(lora, ALPHA, found))
    before = {key: value.clone() for key, value in model.model.diffusion_model.state_dict().items()}
    patched.patch_model(device_to=cpu)
    after = {key: value.clone() for key, value in patched.model.diffusion_model.state_dict().items()}
    patched.unpatch_model()
    changed = set()
    for key, value in before.items():
        place = found.lora_names.place(key.removesuffix(".weight")) if key.endswith(".weight") else None
        modules = place.names if place else ()
        deltas = [_delta(lora, module) for module in modules]
        if not deltas or deltas[0] is None:
            assert torch.equal(after[key], value), key
            continue
        changed |= set(modules)
        torch.testing.assert_close(after[key], value + torch.cat(deltas), rtol=1e-5, atol=1e-5, msg=key)
    assert changed == {key.rpartition(".")[0] for key in lora}, "each layer that was trained, and no other"


def _delta(lora: dict[str, Tensor], module: str) -> Tensor | None:
    """What a layer of diffusers changes by."""
    if f"{module}.lora_A" not in lora:
        return None
    return ALPHA / RANK * lora[f"{module}.lora_B"] @ lora[f"{module}.lora_A"]

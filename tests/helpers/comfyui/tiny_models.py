"""Tiny random Wan, Qwen-Image and Z-Image networks that the real ComfyUI loads, and conditioning for them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.tiny import TEXT_FEATURES, randn, transformer

QWEN_WIDTH, QWEN_TEXT, WAN_WIDTH, Z_IMAGE_WIDTH, Z_IMAGE_TEXT = 128, 32, 24, 288, 16


def wan_file(path: Path, seed: int, **changes: Any) -> Path:
    """The transformer of ``tests.helpers.tiny`` as a file for ComfyUI's diffusion_models folder."""
    from safetensors.torch import save_file

    from pdmd_core.families import family

    network, names = transformer(seed, **changes), family("wan")
    native = {names.native_weight_name(name): value for name, value in network.state_dict().items()}
    metadata = {"config": json.dumps({"transformer": names.comfyui_config(network.config)})}
    save_file(native, path, metadata=metadata)
    return path


def qwen_state(seed: int) -> dict[str, Tensor]:
    """One block of width 128, in diffusers' own layout, which is also the native one."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(seed)
    network = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=1,
        attention_head_dim=QWEN_WIDTH,
        num_attention_heads=1,
        joint_attention_dim=QWEN_TEXT,
        axes_dims_rope=(16, 56, 56),
    )
    return network.state_dict()


Z_IMAGE = {
    "n_heads": 3,
    "n_kv_heads": 3,
    "axes_dims": [32, 32, 32],
    "axes_lens": [64, 32, 32],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8 / 3,
    "z_image_modulation": True,
    "time_scale": 1000.0,
}
"""What ComfyUI says of Z-Image by its width alone, in small."""


def z_image_state(seed: int) -> dict[str, Tensor]:
    """A block of each kind, in ComfyUI's own layout: attention's projections joined."""
    import comfy.ldm.lumina.model
    import comfy.ops

    sizes = {"patch_size": 2, "in_channels": 16, "dim": Z_IMAGE_WIDTH, "n_layers": 1, "cap_feat_dim": Z_IMAGE_TEXT}
    network = comfy.ldm.lumina.model.NextDiT(
        **sizes, qk_norm=True, dtype=torch.float32, operations=comfy.ops.disable_weight_init, **Z_IMAGE
    )
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    return {
        name: randn(*shape, seed=1000 * seed + n) / (math.sqrt(shape[-1]) if len(shape) > 1 else 1)
        for n, (name, shape) in enumerate(shapes.items())
    }


def let_networks_be_small() -> None:
    """ComfyUI takes some widths for granted, its oldest versions Wan's heads: say what they are."""
    import comfy.model_detection as detection

    original = detection.detect_unet_config

    def detect(state: Any, prefix: str, *args: Any, **kwargs: Any) -> Any:
        config = original(state, prefix, *args, **kwargs)
        if config and config.get("image_model") == "qwen_image":
            config["num_attention_heads"] = state[f"{prefix}img_in.weight"].shape[0] // QWEN_WIDTH
            config["joint_attention_dim"] = state[f"{prefix}txt_norm.weight"].shape[0]
        if config and config.get("image_model") == "wan2.1" and config["dim"] == WAN_WIDTH:
            config |= {"num_heads": 2, "freq_dim": 32, "text_dim": TEXT_FEATURES}
        if config and config.get("image_model") == "lumina2" and config["dim"] == Z_IMAGE_WIDTH:
            config |= Z_IMAGE
            if f"{prefix}cap_pad_token" in state:
                config["pad_tokens_multiple"] = 32
        return config

    detection.detect_unet_config = detect


class TinyModels:
    """MODELs (each call loads anew, each seed is another network) and what sampling needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        let_networks_be_small()

    def wan(self, seed: int = 0, **changes: Any) -> Any:
        import comfy.sd

        return comfy.sd.load_diffusion_model(str(wan_file(self.folder / f"wan{seed}.safetensors", seed, **changes)))

    def qwen(self, seed: int = 0) -> Any:
        import comfy.sd

        return comfy.sd.load_diffusion_model_state_dict(qwen_state(seed))

    def load(self, family: str, seed: int = 0) -> Any:
        return self.wan(seed) if family == "wan" else self.qwen(seed)

    @staticmethod
    def conditioning(family: str, seed: int = 7, zero: bool = False) -> list[Any]:
        """As a text encoder gives it: 8 tokens."""
        features = TEXT_FEATURES if family == "wan" else QWEN_TEXT
        return [[randn(1, 8, features, seed=seed) * (not zero), {}]]

    @staticmethod
    def latent(family: str, batch: int = 1) -> dict[str, Tensor]:
        """Empty, 16 channels: 2 frames of 4x4 for Wan, one of 8x8 for Qwen-Image."""
        shape = (batch, 16, 2, 4, 4) if family == "wan" else (batch, 16, 1, 8, 8)
        return {"samples": torch.zeros(shape)}


def lora(family: str, seed: int, modules: int | None = None) -> dict[str, Tensor]:
    """A rank-2 LoRA in the key format of expert files; ``modules`` limits how many it adapts."""
    wan = {f"blocks.{n}.{part}": (24, 24) for n in (0, 1) for part in ("self_attn.q", "cross_attn.v")}
    qwen = {f"transformer_blocks.0.attn.{part}": (QWEN_WIDTH, QWEN_WIDTH) for part in ("to_q", "to_v")}
    tensors: dict[str, Tensor] = {}
    for n, (name, (out, into)) in enumerate(list((wan if family == "wan" else qwen).items())[:modules]):
        scale = 1 / math.sqrt(into)
        tensors[f"diffusion_model.{name}.lora_down.weight"] = randn(2, into, seed=100 * seed + n) * scale
        tensors[f"diffusion_model.{name}.lora_up.weight"] = randn(out, 2, seed=100 * seed + n + 50)
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(3.0)
    return tensors


def save_lora(path: Path, tensors: dict[str, Tensor]) -> Path:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"note": json.dumps("tiny")})
    return path


def teacher_experts(folder: Path, plan: Any) -> Path:
    """Random LoRA experts of the embedded teacher, mild enough that it still makes pictures."""
    from safetensors import safe_open

    from pdmd_core.experts import BaseModel, Expert, Manifest, write_experts
    from pdmd_core.families import family

    wan, targets = family("wan"), ("attn1.to_q", "attn2.to_v", "ffn.net.2")
    weights: dict[str, dict[str, Tensor]] = {phase.name: {} for phase in plan.phases}
    teacher = Path(__file__).resolve().parents[3] / "training/embedded/models/teacher"
    with safe_open(teacher / "transformer/diffusion_pytorch_model.safetensors", "pt") as file:
        for n, key in enumerate(sorted(file.keys())):
            module = key.removesuffix(".weight")
            if not module.endswith(targets) or module == key:
                continue
            out, into = file.get_slice(key).get_shape()
            name = f"diffusion_model.{wan.native_module_name(module)}"
            for k, tensors in enumerate(weights.values()):
                tensors[f"{name}.lora_down.weight"] = randn(4, into, seed=1000 * k + n) / math.sqrt(into)
                tensors[f"{name}.lora_up.weight"] = randn(out, 4, seed=1000 * k + n + 500) * 0.5
                tensors[f"{name}.alpha"] = torch.tensor(4.0)
    entries = tuple(
        Expert(phase.name, f"{phase.name}.safetensors", "lora", "", "transformer", 4, 4.0, targets)
        for phase in plan.phases
    )
    origin = BaseModel("training/embedded/models/teacher", wan.architecture, wan.name)
    write_experts(folder, Manifest(origin, plan, entries, 1.0, {"max_sequence_length": 16}), weights)
    return folder

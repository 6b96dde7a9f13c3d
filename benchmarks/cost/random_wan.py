"""A Wan pipeline with random weights, and random experts for it: what time depends on, without what pictures need."""

from __future__ import annotations

import copy
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

from pdmd_core.experts import BaseModel, Expert, Manifest, lora_to_file, write_experts
from pdmd_core.families import family
from pdmd_core.phases import PhasePlan

PLAN = PhasePlan.from_steps([2, 2], shift=5.0)
TEXT_TOKENS, TEXT_FEATURES = 64, 512


def pipeline(layers: int, device: str, heads: int = 12) -> WanPipeline:
    """Heads of 64 channels: 12 are a width of 768, where 10 layers are 100 million parameters; 80 are the width of 14B.

    No text encoder, no autoencoder.
    """
    torch.manual_seed(0)
    network = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_FEATURES,
        freq_dim=256,
        ffn_dim=4 * 64 * heads,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        transformer=network.requires_grad_(False).eval().to(device),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_random_experts(folder: Path, network: Any, kind: str, rank: int = 64) -> Path:
    """Two experts of this kind: LoRA on every attention and feed-forward layer, or full."""
    names, experts, weights = family("wan"), [], {}
    for seed, phase in enumerate(PLAN.phases):
        generator = torch.Generator().manual_seed(seed)
        if kind == "lora":
            state: dict[str, Tensor] = {}
            for name, module in network.named_modules():
                if isinstance(module, nn.Linear) and name.endswith(names.lora_targets):
                    state[f"{name}.lora_A"] = 0.01 * torch.randn(rank, module.in_features, generator=generator)
                    state[f"{name}.lora_B"] = 0.01 * torch.randn(module.out_features, rank, generator=generator)
            weights[phase.name] = lora_to_file(state, float(rank), names)
            file, targets = f"{phase.name}.safetensors", names.lora_targets
            experts.append(Expert(phase.name, file, "lora", sha256="", rank=rank, alpha=float(rank), targets=targets))
        else:
            weights[phase.name] = {k: v.cpu().contiguous() for k, v in copy.deepcopy(network).state_dict().items()}
            experts.append(Expert(phase.name, f"{phase.name}.safetensors", "full", ""))
    origin = BaseModel("random", names.architecture, names.name)
    write_experts(folder, Manifest(origin, PLAN, tuple(experts)), weights)
    return folder


def inputs(side: int, device: str, seed: int = 0) -> dict[str, Tensor]:
    """Noise of one latent frame of this side, and text."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(1, 16, 1, side, side, generator=generator).to(device),
        "prompt_embeds": torch.randn(1, TEXT_TOKENS, TEXT_FEATURES, generator=generator).to(device),
        "negative_prompt_embeds": torch.randn(1, TEXT_TOKENS, TEXT_FEATURES, generator=generator).to(device),
    }


def finished(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "quartile_1": low, "quartile_3": high}


def machine(device: str) -> str:
    """What ran it."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"

"""Tiny random models of the real diffusers and transformers classes, built in milliseconds; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from pdmd_core.experts import BaseModel, Expert, Manifest, lora_to_file, write_experts
from pdmd_core.families import family
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import Roles, RoleSpec

TEXT_FEATURES = 32
LATENT_CHANNELS = 16
LATENT_SHAPE = (LATENT_CHANNELS, 2, 4, 2)
"""Of the size in CALL."""
CALL = {"prompt": "a panda", "height": 32, "width": 16, "num_frames": 5, "max_sequence_length": 12}
"""Arguments of a small pipeline call."""


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal noise that depends on nothing but the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, so that every text has tokens."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *sorted(_bytes())])}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def _bytes() -> list[str]:
    return pre_tokenizers.ByteLevel.alphabet()


def text_encoder() -> UMT5EncoderModel:
    """One layer, 32 features."""
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=300, d_model=TEXT_FEATURES, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return UMT5EncoderModel(config).eval()


def autoencoder() -> AutoencoderKLWan:
    """The real shape rules (8 pixels, 4 frames, 16 channels) with 3 features inside."""
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=3,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()


def transformer(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    """Two blocks of width 24: 28,000 parameters."""
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "text_dim": TEXT_FEATURES,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**config | changes).eval()


def wan_pipeline(scheduler: SchedulerMixin | None = None) -> WanPipeline:
    """A stock text-to-video pipeline with one transformer; equal weights every time."""
    pipeline = WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=autoencoder(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=transformer(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_wan_pipeline(folder: Path) -> Path:
    """The pipeline in a folder that ``from_pretrained`` reads."""
    wan_pipeline().save_pretrained(folder)
    return folder


def randomise(roles: Roles, role: str, seed: int, scale: float = 0.3) -> None:
    """Give a role weights far from the teacher's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in roles.parameters(role):
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def lora_roles(plan: PhasePlan, rank: int = 4, alpha: float = 6.0, targets: tuple[str, ...] | None = None) -> Roles:
    """One random LoRA expert for each phase, all different, on the transformer of ``wan_pipeline``."""
    spec = RoleSpec("lora", rank, alpha, targets)
    roles = Roles(transformer(), family("wan"), {phase.name: spec for phase in plan.phases})
    for seed, phase in enumerate(plan.phases):
        randomise(roles, phase.name, seed)
    return roles


def write_lora_experts(
    folder: Path, plan: PhasePlan, roles: Roles, base: str = "tiny/wan", training: dict[str, object] | None = None
) -> Manifest:
    """An experts folder (manifest and weights) of these roles."""
    names, weights, experts = roles.family, {}, []
    for phase in plan.phases:
        spec = roles.specs[phase.name]
        weights[phase.name] = lora_to_file(roles.state_dict(phase.name), spec.alpha, names)
        experts.append(
            Expert(
                name=phase.name,
                file=f"{phase.name}.safetensors",
                kind="lora",
                sha256="",
                rank=spec.rank,
                alpha=names.lora_keys.alpha_in_file(spec.rank, spec.alpha),
                targets=spec.targets or names.lora_targets,
            )
        )
    origin = BaseModel(base, names.architecture, names.name)
    return write_experts(folder, Manifest(origin, plan, tuple(experts), 1.0, training or {}), weights)

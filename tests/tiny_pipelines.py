"""Tiny stock pipelines of many families, experts for them, and their sampling loop written by hand.

A ``Case`` is a pipeline with a small call and the way its network is called; ``euler`` walks a plan with networks that
know nothing of phases, given the conditioning that the stock pipeline hands to its own network.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import (
    BatchFeature,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from pdmd_core.experts import BaseModel, Expert, Manifest, lora_to_file, write_experts
from pdmd_core.families import family
from pdmd_core.phases import PhasePlan
from tests.tiny import autoencoder, randn, text_encoder, tokenizer, transformer, wan_pipeline

TARGETS = ("to_q", "to_v", "to_out.0")
"""Modules that LoRA experts adapt here."""
Velocity = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor, Tensor], Tensor]
"""Network, arguments of a call of the stock pipeline, x, timestep (sigma * 1000, float32) to the velocity at x."""


@dataclass(frozen=True)
class Case:
    """A pipeline, a small call of it, the shape of its latents, and how it calls its network."""

    build: Callable[..., DiffusionPipeline]
    call: Mapping[str, Any]
    latents: tuple[int, ...]
    velocity: Velocity
    no_guidance: Mapping[str, float] = field(default_factory=lambda: {"guidance_scale": 1.0})
    """How a stock pipeline of this kind is told to do without guidance."""

    @property
    def name(self) -> str:
        return self.build.__name__

    def noise(self, seed: int = 5) -> Tensor:
        return randn(*self.latents, seed=seed)

    def sample(self, pipe: DiffusionPipeline, **arguments: Any) -> Tensor:
        """Latents that the pipeline makes from ``noise()``."""
        call = {**self.call, "latents": self.noise(), "output_type": "latent", "return_dict": False, **arguments}
        return pipe(**call)[0]


@torch.no_grad()
def euler(
    case: Case, plan: PhasePlan, networks: Sequence[nn.Module], x: Tensor | None = None, start: int = 0
) -> Tensor:
    """The sampling loop by hand: ``networks[k]`` takes the steps of phase k; from x at step ``start``."""
    args, kwargs = first_call(case)
    x = case.noise() if x is None else x
    sigmas = torch.tensor([*plan.sigmas, 0.0])
    order = [network for network, phase in zip(networks, plan.phases, strict=True) for _ in phase.sigmas]
    for i in range(start, len(order)):
        timestep = (sigmas[i] * 1000).expand(len(x))
        x = x + (sigmas[i + 1] - sigmas[i]) * case.velocity(order[i], args, kwargs, x, timestep)
    return x


class _Called(Exception):
    pass


def first_call(case: Case) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the stock pipeline hands to its network first, with a stock scheduler and without guidance."""
    pipe, seen = case.build(), []

    def see(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Called

    pipe.transformer.register_forward_pre_hook(see, with_kwargs=True)
    with contextlib.suppress(_Called):
        case.sample(pipe, num_inference_steps=4, **case.no_guidance)
    return seen[0]


# --- experts ------------------------------------------------------------------


def lora_experts(
    folder: Path, pipe: DiffusionPipeline, plan: PhasePlan, components: Sequence[str] | None = None, **changes: Any
) -> Path:
    """A folder of random LoRA experts for this pipeline, all different, with the keys that its own loader reads."""
    components = components or ["transformer"] * len(plan)
    weights, experts, rank = {}, [], 4
    for seed, (phase, component) in enumerate(zip(plan.phases, components, strict=True)):
        network = getattr(pipe, component)
        alpha = 6.0 if _is_wan(network) else float(rank)
        state = random_lora(network, rank, seed)
        weights[phase.name] = lora_file(network, state, alpha)
        experts.append(Expert(phase.name, f"{phase.name}.safetensors", "lora", "", component, rank, alpha, TARGETS))
    return _write(folder, pipe, plan, experts, weights, **changes)


def random_lora(network: nn.Module, rank: int, seed: int, targets: tuple[str, ...] = TARGETS) -> dict[str, Tensor]:
    """``<module>.lora_A`` and ``.lora_B`` for the linear layers with these names."""
    linear = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) and n.endswith(targets)}
    state = {}
    for index, (name, module) in enumerate(linear.items()):
        state[f"{name}.lora_A"] = 0.5 * randn(rank, module.in_features, seed=1000 * seed + index)
        state[f"{name}.lora_B"] = 0.5 * randn(module.out_features, rank, seed=1000 * seed + index + 500)
    return state


def lora_file(network: nn.Module, state: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The tensors of a LoRA file: in our own format for Wan, in diffusers' otherwise (alpha is the rank)."""
    if _is_wan(network):
        return lora_to_file(state, alpha, family("wan"))
    return {f"transformer.{key}.weight": value for key, value in state.items()}


def full_experts(folder: Path, pipe: DiffusionPipeline, plan: PhasePlan, **changes: Any) -> Path:
    """A folder of full experts: the pipeline's network with other random weights for each phase."""
    weights, experts = {}, []
    for seed, phase in enumerate(plan.phases):
        weights[phase.name] = {k: v.contiguous() for k, v in shifted(pipe.transformer, seed).state_dict().items()}
        experts.append(Expert(phase.name, f"{phase.name}.safetensors", "full", ""))
    return _write(folder, pipe, plan, experts, weights, **changes)


@torch.no_grad()
def shifted(network: nn.Module, seed: int) -> nn.Module:
    """A copy with noise on every weight."""
    network, generator = copy.deepcopy(network), torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def networks_of(case: Case, folder: Path) -> list[nn.Module]:
    """The experts of a folder as stock networks: LoRA files through the stock loader, each in a pipeline of its own."""
    manifest, found = Manifest.from_json((folder / "phased_experts.json").read_text()), []
    for expert in manifest.experts:
        pipe = case.build()
        if expert.kind == "lora":
            second = {"load_into_transformer_2": True} if expert.component != "transformer" else {}
            pipe.load_lora_weights(folder, weight_name=expert.file, **second)
        else:
            from safetensors.torch import load_file

            pipe.transformer.load_state_dict(load_file(folder / expert.file), assign=True)
        found.append(getattr(pipe, expert.component))
    return found


def _is_wan(network: nn.Module) -> bool:
    return type(network).__name__ == "WanTransformer3DModel"


def _write(
    folder: Path,
    pipe: DiffusionPipeline,
    plan: PhasePlan,
    experts: list[Expert],
    weights: dict[str, dict[str, Tensor]],
    base: str = "tiny/base",
    guidance_scale: float = 1.0,
) -> Path:
    kind = type(pipe.transformer).__name__
    origin = BaseModel(base, kind, "wan" if kind == "WanTransformer3DModel" else kind)
    write_experts(folder, Manifest(origin, plan, tuple(experts), guidance_scale), weights)
    return folder


# --- pipelines ----------------------------------------------------------------


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan() -> DiffusionPipeline:
    return wan_pipeline()


def wan_two(boundary_ratio: float = 0.875) -> DiffusionPipeline:
    """As Wan 2.2: two networks, high noise first."""
    pipe = diffusers.WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=transformer(0),
        transformer_2=transformer(1),
        boundary_ratio=boundary_ratio,
    )
    return quiet(pipe)


def wan_image_to_video() -> DiffusionPipeline:
    torch.manual_seed(0)
    config = {**transformer().config, "in_channels": 36}
    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=diffusers.WanTransformer3DModel.from_config(config).eval(),
    )
    return quiet(pipe)


def qwen_transformer() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    ).eval()


def qwen_autoencoder(levels: int = 3) -> nn.Module:
    """Each level but the first halves the sides."""
    torch.manual_seed(0)
    return diffusers.AutoencoderKLQwenImage(
        base_dim=2,
        z_dim=4,
        dim_mult=[1] * levels,
        num_res_blocks=1,
        temperal_downsample=[False] * (levels - 1),
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def qwen_tokenizer() -> Qwen2Tokenizer:
    """One token for each byte, and the special tokens that templates use."""
    vocabulary = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL])}
    built = Qwen2Tokenizer(vocab=vocabulary, merges=[], extra_special_tokens=list(SPECIAL[1:]))
    built.chat_template = (
        "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n"
    )
    return built


def qwen_text_encoder() -> nn.Module:
    torch.manual_seed(0)
    token = qwen_tokenizer().convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
            "rope_theta": 1000000.0,
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        image_token_id=token("<|image_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def _qwen(kind: str, levels: int = 3, **more: Any) -> DiffusionPipeline:
    pipe = getattr(diffusers, kind)(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=qwen_autoencoder(levels),
        text_encoder=qwen_text_encoder(),
        tokenizer=qwen_tokenizer(),
        transformer=qwen_transformer(),
        **more,
    )
    return quiet(pipe)


def qwen_image() -> DiffusionPipeline:
    return _qwen("QwenImagePipeline")


def qwen_image_to_image() -> DiffusionPipeline:
    return _qwen("QwenImageImg2ImgPipeline")


class PictureProcessor:
    """What Qwen2VLProcessor does with text and pictures; its part for clips needs torchvision."""

    def __init__(self) -> None:
        self.tokenizer = qwen_tokenizer()
        self.image_processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28**2, "longest_edge": 4 * 28**2})

    def __call__(self, text: list[str], images: Any, padding: bool, return_tensors: str) -> BatchFeature:
        seen = self.image_processor(images=images, return_tensors=return_tensors)
        tokens = int(seen["image_grid_thw"].prod()) // self.image_processor.merge_size**2
        text = [part.replace("<|image_pad|>", "<|image_pad|>" * tokens) for part in text]
        return BatchFeature({**self.tokenizer(text, padding=padding, return_tensors=return_tensors), **seen})


def qwen_image_edit() -> DiffusionPipeline:
    """It scales every picture to a million pixels: an autoencoder whose latents are 32 times smaller."""
    return _qwen("QwenImageEditPipeline", levels=6, processor=PictureProcessor())


def _clip(kind: type[nn.Module]) -> nn.Module:
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


def _t5() -> nn.Module:
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).eval()


def _autoencoder_kl(channels: int) -> nn.Module:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()


def flux(guidance_embeds: bool = False) -> DiffusionPipeline:
    torch.manual_seed(0)
    network = diffusers.FluxTransformer2DModel(
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
    pipe = diffusers.FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_autoencoder_kl(1),
        text_encoder=_clip(CLIPTextModel),
        tokenizer=tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=tokenizer(),
        transformer=network,
    )
    return quiet(pipe)


def stable_diffusion_3() -> DiffusionPipeline:
    torch.manual_seed(0)
    network = diffusers.SD3Transformer2DModel(
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
    pipe = diffusers.StableDiffusion3Pipeline(
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
    return quiet(pipe)


def z_image() -> DiffusionPipeline:
    torch.manual_seed(0)
    network = diffusers.ZImageTransformer2DModel(
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
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=0.36,
        shift_factor=0.12,
    ).eval()
    config = Qwen3Config(
        vocab_size=512,
        bos_token_id=None,
        eos_token_id=None,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    pipe = diffusers.ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=Qwen3Model(config).eval(),
        tokenizer=qwen_tokenizer(),
        transformer=network,
    )
    return quiet(pipe)


# --- how the pipelines call their networks -------------------------------------


def _plain(network: nn.Module, args: Any, kwargs: dict[str, Any], x: Tensor, timestep: Tensor) -> Tensor:
    return network(*args, **{**kwargs, "hidden_states": x, "timestep": timestep})[0]


def _thousandth(network: nn.Module, args: Any, kwargs: dict[str, Any], x: Tensor, timestep: Tensor) -> Tensor:
    return network(*args, **{**kwargs, "hidden_states": x, "timestep": timestep / 1000})[0]


def _beside_channels(network: nn.Module, args: Any, kwargs: dict[str, Any], x: Tensor, timestep: Tensor) -> Tensor:
    states = torch.cat([x, kwargs["hidden_states"][:, x.shape[1] :]], dim=1)
    return network(*args, **{**kwargs, "hidden_states": states, "timestep": timestep})[0]


def _beside_tokens(network: nn.Module, args: Any, kwargs: dict[str, Any], x: Tensor, timestep: Tensor) -> Tensor:
    states = torch.cat([x, kwargs["hidden_states"][:, x.shape[1] :]], dim=1)
    return network(*args, **{**kwargs, "hidden_states": states, "timestep": timestep / 1000})[0][:, : x.shape[1]]


def _reversed(network: nn.Module, args: Any, kwargs: dict[str, Any], x: Tensor, timestep: Tensor) -> Tensor:
    _, _, captions = args
    states = list(x.unsqueeze(2).unbind(0))
    return -torch.stack(network(states, (1000 - timestep) / 1000, captions, **kwargs)[0]).squeeze(2)


VIDEO = {"prompt": "a panda", "height": 32, "width": 16, "num_frames": 5, "max_sequence_length": 12}
PICTURE = {"prompt": "a panda", "height": 32, "width": 32, "max_sequence_length": 16}
GIVEN = Image.linear_gradient("L").convert("RGB").resize((32, 32))
"""The picture that image pipelines start from."""
EDIT = {**PICTURE, "height": 128, "width": 128, "image": GIVEN}

CASES = {
    case.name: case
    for case in (
        Case(wan, VIDEO, (1, 16, 2, 4, 2), _plain),
        Case(wan_two, VIDEO, (1, 16, 2, 4, 2), _plain),
        Case(wan_image_to_video, {**VIDEO, "image": GIVEN.resize((16, 32))}, (1, 16, 2, 4, 2), _beside_channels),
        Case(qwen_image, PICTURE, (1, 16, 16), _thousandth, {"true_cfg_scale": 1.0}),
        Case(
            qwen_image_edit,
            {**PICTURE, "height": 128, "width": 128, "image": GIVEN},
            (1, 4, 16),
            _beside_tokens,
            {"true_cfg_scale": 1.0},
        ),
        Case(flux, {**PICTURE, "height": 8, "width": 8}, (1, 16, 4), _thousandth, {}),
        Case(stable_diffusion_3, PICTURE, (1, 4, 32, 32), _plain),
        Case(z_image, PICTURE, (1, 16, 16, 16), _reversed, {"guidance_scale": 0.0}),
    )
}

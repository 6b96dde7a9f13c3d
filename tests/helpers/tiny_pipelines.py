"""Small calls of stock pipelines of many families, experts for them, and their sampling loop written by hand.

A ``Case`` is a pipeline with a small call and the way its network is called; ``euler`` walks a plan with networks that
know nothing of phases, given the conditioning that the stock pipeline hands to its own network.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from pdmd_core.experts import BaseModel, Expert, Manifest, lora_to_file, write_experts
from pdmd_core.families import family
from pdmd_core.phases import PhasePlan
from tests.helpers.tiny import randn, wan_pipeline
from tests.helpers.tiny_families import (
    flux,
    qwen_image,
    qwen_image_edit,
    qwen_image_edit_plus,
    stable_diffusion_3,
    wan_image,
    wan_two_networks,
    z_image,
)

PLAN = PhasePlan.from_steps([2, 2], shift=5.0)
THREE = PhasePlan.from_steps([1, 2, 1], shift=5.0)
TWO_COMPONENTS = ["transformer", "transformer_2"]
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
    name: str = ""
    """In ``CASES``."""

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


KINDS = {"lora": lora_experts, "full": full_experts}
"""How experts of each kind are written."""


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

            # cloned: where weights lie in memory decides about the last digit
            weights = {name: value.clone() for name, value in load_file(folder / expert.file).items()}
            pipe.transformer.load_state_dict(weights, assign=True)
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
NO_TRUE_GUIDANCE = {"true_cfg_scale": 1.0}

CASES = {
    name: replace(case, name=name)
    for name, case in {
        "wan": Case(wan_pipeline, VIDEO, (1, 16, 2, 4, 2), _plain),
        "wan_two": Case(wan_two_networks, VIDEO, (1, 16, 2, 4, 2), _plain),
        "wan_image_to_video": Case(
            wan_image, {**VIDEO, "image": GIVEN.resize((16, 32))}, (1, 16, 2, 4, 2), _beside_channels
        ),
        "qwen_image": Case(qwen_image, PICTURE, (1, 16, 16), _thousandth, NO_TRUE_GUIDANCE),
        "qwen_image_edit": Case(qwen_image_edit, EDIT, (1, 4, 16), _beside_tokens, NO_TRUE_GUIDANCE),
        "qwen_image_edit_plus": Case(qwen_image_edit_plus, EDIT, (1, 4, 16), _beside_tokens, NO_TRUE_GUIDANCE),
        "flux": Case(flux, {**PICTURE, "height": 8, "width": 8}, (1, 16, 4), _thousandth, {}),
        "stable_diffusion_3": Case(stable_diffusion_3, PICTURE, (1, 4, 32, 32), _plain),
        "z_image": Case(z_image, PICTURE, (1, 16, 16, 16), _reversed, {"guidance_scale": 0.0}),
    }.items()
}

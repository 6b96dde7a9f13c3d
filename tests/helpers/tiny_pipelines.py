"""Experts for tiny pipelines of every family, and their sampling loop written by hand.

``euler`` walks a plan with networks that know nothing of phases, given the conditioning that the stock pipeline hands
to its own network.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from pdmd_core.experts import BaseModel, Expert, Manifest, lora_to_file, write_experts
from pdmd_core.families import ModelFamily, known_family
from pdmd_core.phases import PhasePlan
from tests.helpers.families.case import Case
from tests.helpers.tiny import randn

PLAN = PhasePlan.from_steps([2, 2], shift=5.0)
THREE = PhasePlan.from_steps([1, 2, 1], shift=5.0)
TWO_COMPONENTS = ["transformer", "transformer_2"]
TARGETS = ("to_q", "to_v", "to_out.0")
"""Modules that LoRA experts adapt here."""
ALPHA = 6.0
"""Of LoRA experts, where their files can have another than the rank."""
GIVEN = Image.linear_gradient("L").convert("RGB").resize((32, 32))
"""The picture that image-to-image pipelines start from."""


@torch.no_grad()
def euler(
    case: Case, plan: PhasePlan, networks: Sequence[nn.Module], x: Tensor | None = None, start: int = 0
) -> Tensor:
    """The sampling loop by hand: ``networks[k]`` takes the steps of phase k; from x at step ``start``."""
    assert case.velocity is not None
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
        case.sample(pipe, num_inference_steps=4, **case.unguided)
    return seen[0]


# --- experts ------------------------------------------------------------------


def components_of(pipe: DiffusionPipeline, plan: PhasePlan) -> list[str]:
    """The network of each phase: the first for the first, the last for the others."""
    found = _family(pipe.transformer)
    names = found.teacher_routing(pipe.config).components if found else ("transformer",)
    return [names[0], *[names[-1]] * (len(plan) - 1)]


def lora_experts(
    folder: Path, pipe: DiffusionPipeline, plan: PhasePlan, components: Sequence[str] | None = None, **changes: Any
) -> Path:
    """A folder of random LoRA experts for this pipeline, all different, with the keys that an export has."""
    components = components or ["transformer"] * len(plan)
    weights, experts, rank = {}, [], 4
    for seed, (phase, component) in enumerate(zip(plan.phases, components, strict=True)):
        network = getattr(pipe, component)
        weights[phase.name] = lora_file(network, random_lora(network, rank, seed), ALPHA)
        found = _family(network)
        alpha = found.lora_keys.alpha_in_file(rank, ALPHA) if found else float(rank)
        experts.append(Expert(phase.name, f"{phase.name}.safetensors", "lora", "", component, rank, alpha, TARGETS))
    return _write(folder, pipe, plan, experts, weights, **changes)


def random_lora(network: nn.Module, rank: int, seed: int, targets: tuple[str, ...] = TARGETS) -> dict[str, Tensor]:
    """``<module>.lora_A`` and ``.lora_B`` for the linear layers with these names (Kandinsky has others)."""
    targets = (*targets, "to_query", "to_value")
    blocks = found.blocks if (found := _family(network)) else ("",)
    linear = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(targets) and name.startswith(blocks)
    }
    state = {}
    for index, (name, module) in enumerate(linear.items()):
        state[f"{name}.lora_A"] = 0.5 * randn(rank, module.in_features, seed=1000 * seed + index)
        state[f"{name}.lora_B"] = 0.5 * randn(module.out_features, rank, seed=1000 * seed + index + 500)
    return state


def lora_file(network: nn.Module, state: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The tensors of a LoRA file: as the network's family has them, of no family in diffusers' (alpha is the rank)."""
    found = _family(network)
    if found is not None:
        return lora_to_file(state, alpha, found)
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
    manifest, networks = Manifest.from_json((folder / "phased_experts.json").read_text()), []
    for expert in manifest.experts:
        pipe = case.build()
        if expert.kind == "lora":
            if case.family:
                case.family.load_lora(pipe, folder, expert.component, weight_name=expert.file)
            else:
                pipe.load_lora_weights(folder, weight_name=expert.file)
        else:
            from safetensors.torch import load_file

            pipe.transformer.load_state_dict(load_file(folder / expert.file), assign=True)
        networks.append(getattr(pipe, expert.component))
    return networks


def _family(network: nn.Module) -> ModelFamily | None:
    return known_family(type(network).__name__)


def _write(
    folder: Path,
    pipe: DiffusionPipeline,
    plan: PhasePlan,
    experts: list[Expert],
    weights: dict[str, dict[str, Tensor]],
    base: str = "tiny/base",
    guidance_scale: float = 1.0,
) -> Path:
    kind, found = type(pipe.transformer).__name__, _family(pipe.transformer)
    origin = BaseModel(base, kind, found.name if found else kind)
    write_experts(folder, Manifest(origin, plan, tuple(experts), guidance_scale), weights)
    return folder

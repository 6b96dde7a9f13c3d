"""The weights of roles: LoRA adapters on one frozen network, of peft's layers, or full copies of it."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer


def add_adapter(
    network: nn.Module, role: str, rank: int, alpha: float, targets: Sequence[str], blocks: Sequence[str]
) -> dict[str, BaseTunerLayer]:
    """Put the adapter of a role into a network.

    Args:
        network: The network, whose adapted modules are replaced by peft's layers.
        role: The name of the adapter.
        rank: The LoRA rank.
        alpha: The LoRA alpha; the adapter is scaled by alpha / rank.
        targets: Suffixes of the modules to adapt.
        blocks: Names of the network's lists of blocks; modules outside of them have the same suffixes in some networks.

    Returns:
        Path of each adapted module, of this and of earlier adapters, to its layer.

    Raises:
        ValueError: If there is no such module.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    inner, outer = ("|".join(map(re.escape, names)) for names in (targets, blocks))
    wanted = re.compile(rf"((?:.+?\.)?(?:{outer})\.\d+)\.((?:.+\.)?(?:{inner}))")
    linear = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, BaseTunerLayer))]
    found: dict[str, list[str]] = {}
    for match in filter(None, map(wanted.fullmatch, linear)):
        found.setdefault(match[1], []).append(match[2])
    if not found:
        raise ValueError(f"no linear layer of the blocks {', '.join(blocks)} ends in {', '.join(targets)}")
    with warnings.catch_warnings():  # several adapters are the point
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for block, names in found.items():  # peft compares every module with every adapted one
            config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="|".join(map(re.escape, names)))
            inject_adapter_in_model(config, network.get_submodule(block), adapter_name=role)
    return {path: module for path, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


def activate_adapter(layers: Mapping[str, BaseTunerLayer], role: str | None) -> None:
    """Make layers compute with the adapter of one role.

    This sets what peft's ``set_adapter`` and ``enable_adapters`` set. They also freeze the other adapters, which would
    cut a graph that is still to be run backwards, and take 20 times as long, in every evaluation.

    Args:
        layers: What ``add_adapter`` returned last.
        role: The name of the adapter; None for the network without adapters.
    """
    for layer in layers.values():
        layer._disable_adapters = role is None
        if role is not None:
            layer._active_adapter = role


def adapter_parameters(layers: Mapping[str, BaseTunerLayer], role: str) -> dict[str, nn.Parameter]:
    """Get the weights of an adapter.

    Args:
        layers: What ``add_adapter`` returned last.
        role: The name of the adapter.

    Returns:
        ``<module>.lora_A`` and ``<module>.lora_B`` to parameters.
    """
    named = {}
    for path, layer in layers.items():
        if role in layer.lora_A:
            named[f"{path}.lora_A"] = layer.lora_A[role].weight
            named[f"{path}.lora_B"] = layer.lora_B[role].weight
    return named


@torch.no_grad()
def reset_adapter(parameters: Mapping[str, nn.Parameter], generator: torch.Generator | None) -> None:
    """Make an adapter change nothing and able to learn: zero up-projections and fresh down-projections.

    Args:
        parameters: What ``adapter_parameters`` gives.
        generator: Of the fresh weights, on the CPU; torch's own when None.
    """
    for name, parameter in parameters.items():
        if name.endswith("lora_B"):
            parameter.zero_()
        else:
            bound = 1 / parameter.shape[1] ** 0.5  # drawn on the CPU: the same on every device
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


def state_without_adapters(network: nn.Module) -> dict[str, Tensor]:
    """Get the weights of a network as they are named without adapters.

    Args:
        network: A network with adapters.

    Returns:
        Name to tensor; not copies.
    """
    state = {}
    for name, value in network.state_dict().items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        state[name.replace(".base_layer.", ".")] = value
    return state


def full_copy(network: nn.Module, empty: bool) -> nn.Module:
    """Copy a network in float32.

    Args:
        network: The network.
        empty: Whether the copy has shapes only, on the meta device.

    Returns:
        The copy.
    """
    instead = {}
    if empty:
        for parameter in network.parameters():
            shape = torch.empty_like(parameter, dtype=torch.float32, device="meta")
            instead[id(parameter)] = nn.Parameter(shape, requires_grad=False)
    return copy.deepcopy(network, instead).float()


def check_fits(role: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Check that weights have the names and shapes of a role's own.

    Args:
        role: The name of the role, for the error.
        own: Its weights.
        state: The weights that are to take their place.

    Raises:
        ValueError: If they do not.
    """
    if set(own) != set(state):
        raise ValueError(
            f"the weights of {role!r} do not match its network: missing {_few(set(own) - set(state))}, "
            f"unexpected {_few(set(state) - set(own))}"
        )
    for name, value in own.items():
        if value.shape != state[name].shape:
            raise ValueError(f"{role!r} expects {name} of shape {tuple(value.shape)}, found {tuple(state[name].shape)}")


def _few(names: set[str]) -> str:
    shown = sorted(names)[:2]
    return f"{len(names)} ({', '.join(shown)}{', ...' if len(names) > 2 else ''})" if names else "none"

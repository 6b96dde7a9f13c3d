"""The optimizers of trained roles: AdamW, with moments in float32 or in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training.config.command_line import UserError
from training.config.schema import DistillConfig
from training.config.sections import RoleSection

MOMENTS = {"adamw": 8.0, "adamw_8bit": 2 * (1 + 4 / 256)}
"""Bytes that the moments of one weight take, by ``optimizer``: 8 bits have a float32 scale for each 256 of them."""
FUSED = ("cpu", "cuda", "xpu")
"""Devices on which torch makes the whole step of AdamW in one kernel."""


def check_libraries(config: DistillConfig) -> None:
    """Raises UserError where a library is missing that an optimizer of this run takes: before anything is loaded."""
    if "adamw_8bit" in (config.generator.optimizer, config.fake.optimizer):
        _adamw_8bit()


def make_optimizer(parameters: list[nn.Parameter], section: RoleSection, device: torch.device) -> Optimizer:
    """AdamW as the section says.

    Raises UserError where the library of the 8-bit one is not installed, and for weights in half precision, in which
    an update of Adam's size is nothing.
    """
    if half := {str(p.dtype).removeprefix("torch.") for p in parameters if p.dtype.itemsize < 4}:
        found = ", ".join(half)
        raise UserError(f"weights that train are float32, found {found}: updates of lr {section.lr} would vanish")
    settings: dict[str, Any] = {"lr": section.lr, "betas": section.betas, "weight_decay": section.weight_decay}
    if section.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings, fused=device.type in FUSED)
    optimizer = _adamw_8bit()(parameters, **settings)
    if device.type == "cpu":  # a step that is compiled takes a compiler and seconds, and nothing is gained
        optimizer.step = torch.compiler.set_stance("force_eager")(optimizer.step)
    return optimizer


def _adamw_8bit() -> Callable[..., Any]:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"optimizer: adamw_8bit takes the package torchao ({error}): pip install 'phased-dmd[low-memory]', or use "
            "adamw"
        ) from None
    return AdamW8bit


def lr_factor(update: int, updates: int, decay_share: float) -> float:
    """Compute the factor of the learning rates in an update of a phase.

    Args:
        update: How many updates of the phase are done.
        updates: How many it has.
        decay_share: The last share of them over which learning rates fall linearly to zero, in [0, 1].

    Returns:
        A factor in (0, 1].
    """
    return min(1.0, (updates - update) / (decay_share * updates)) if decay_share else 1.0


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """The learning rate from now on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def make_state(optimizer: Optimizer) -> None:
    """Give an optimizer the state of one that has made a step, by a step of length zero."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    set_rate(optimizer, 0.0)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    set_rate(optimizer, rates[0])

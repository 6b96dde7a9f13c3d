"""Mixed precision: float32 adapters and copies that compute in bfloat16 under autocast."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, KwargsHandler
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def make_accelerator(
    precision: str, device: str | None = None, timeout_minutes: int | None = None, **settings: Any
) -> Accelerator:
    """Make what knows device, precision and processes.

    Autocast keeps no casts of weights. It would keep those that were made without gradient too, and a recorded step
    that found one of them would train nothing (torch up to 2.9); they would also stay in memory beside the weights.

    Args:
        precision: ``bf16`` or ``no``.
        device: cpu to leave an accelerator alone; where there is none it is the CPU anyway.
        timeout_minutes: How long processes wait for each other; torch's own time when None.
        settings: Further arguments of ``Accelerator``.
    """
    handlers: list[KwargsHandler] = [AutocastKwargs(cache_enabled=False)]
    if timeout_minutes is not None:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes)))
    return Accelerator(
        cpu=device == "cpu" or not torch.accelerator.is_available(),  # else processes on CPUs do not find each other
        mixed_precision=precision,
        kwargs_handlers=handlers,
        **settings,
    )


def leave_casts_to_autocast(networks: Iterable[nn.Module]) -> None:
    """Let adapters take their inputs as they come.

    peft brings inputs to the dtype of an adapter's weights, float32, from which autocast brings them back at once.
    """
    for network in networks:
        for module in network.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False

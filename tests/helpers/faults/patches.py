"""What goes wrong in one of several processes of a run; ``interference.on_process`` calls these before it starts."""

from __future__ import annotations

import math
import os
import signal
from typing import Any

import torch
from torch import nn

from training.loop import phase as phase_training
from training.loop import teacher_comparison


def infinite_gradient() -> None:
    """The sixth gradient of this process, of the third update's generator, is infinite."""
    original, calls = phase_training.average_gradients, 0

    def average_gradients(parameters: list[nn.Parameter], processes: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.fill_(math.inf)
        original(parameters, processes)

    phase_training.average_gradients = average_gradients  # type: ignore[assignment]


def sigterm() -> None:
    """This process gets SIGTERM in its third update."""
    original, calls = phase_training.PhaseTraining.update, 0

    def update(*arguments: Any) -> phase_training.Update:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    phase_training.PhaseTraining.update = update  # type: ignore[method-assign]


def failing_validation() -> None:
    """The second validation of this process runs out of memory, while others wait for its shards."""
    original, calls = teacher_comparison.validation_latents, 0

    def validation_latents(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("Tried to allocate 8 GiB")
        return original(*arguments)

    teacher_comparison.validation_latents = validation_latents

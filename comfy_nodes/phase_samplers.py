"""A sampler for each phase, in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.samplers
import torch

from ..pdmd_core.phases import PhasePlan
from .errors import NodeError
from .timeline import runs_of

_NOT_IN_PARTS = frozenset({"ddim"})  # has options of its own for inpainting, which hold for a whole run


def sampler_of_phases(plan: PhasePlan, text: str, usual: str) -> Any:
    """Make the sampler of a run: one for all phases, or one for each.

    Args:
        plan: The plan.
        text: Names of samplers with commas between, one for each phase or one for all; empty for the usual one.
        usual: The name of the sampler for all phases.

    Returns:
        A SAMPLER. Each part of the run is sampled as a run of its own from what the part before left, without noise
        between; samplers with a memory begin anew, and those that add noise have another seed in each part.

    Raises:
        NodeError: If the text does not name a sampler for each phase.
    """
    if not text.strip():
        return comfy.samplers.sampler_object(usual)
    names = [name.strip() for name in text.replace("\uff0c", ",").split(",")]
    phases = [phase.name for phase in plan.phases]
    if len(names) == 1:
        names *= len(phases)
    known = [name for name in comfy.samplers.SAMPLER_NAMES if name not in _NOT_IN_PARTS]
    unknown = [name for name in names if name not in known]
    if len(names) != len(phases) or unknown:
        found = f"{unknown[0]!r}" if unknown else f"{len(names)} in {text!r}"
        raise NodeError(
            f"samplers are one name for each of {', '.join(phases)} with commas (heun, euler), found {found}"
        )
    functions = [comfy.samplers.sampler_object(name).sampler_function for name in names]
    return comfy.samplers.KSAMPLER(_in_parts(plan, functions))


def _in_parts(plan: PhasePlan, functions: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    def sample(
        model: Any,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
    ) -> torch.Tensor:
        owners = [plan.phase_index(min(float(sigma), 1.0)) for sigma in sigmas[:-1]]
        words = extra_args or {}
        for part, (first, count) in enumerate(runs_of(owners)):
            own = {**words, "seed": words["seed"] + part} if words.get("seed") is not None else words

            def report(values: dict[str, Any], first: int = first) -> None:
                if callback is not None:
                    callback({**values, "i": values["i"] + first})

            inside = sigmas[first : first + count + 1]
            x = functions[owners[first]](model, x, inside, extra_args=own, callback=report, disable=disable)
        return x

    return sample

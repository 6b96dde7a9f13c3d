"""LoRA strengths by step: a phase whose steps differ is several phases of the same expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from ..pdmd_core.phases import Phase, PhasePlan
from .widget_text import Cfg


@dataclass(frozen=True)
class Parts:
    """A plan in which each phase has one strength."""

    plan: PhasePlan
    """The plan; its sigmas are those of the one that it was made of."""
    phases: list[int]
    """Which phase of that plan each part belongs to."""
    strengths: list[float]
    """The strength of each part."""
    cfgs: list[Cfg]
    """The cfg of each part."""


def in_parts(
    plan: PhasePlan,
    strengths: Sequence[float | tuple[float, ...]],
    cfgs: Sequence[Cfg],
    factors: Sequence[float] | None = None,
) -> Parts:
    """Divide the phases of a plan where the strength changes from step to step.

    Args:
        plan: The plan.
        strengths: The strength of each phase; a tuple has one for each of its steps.
        cfgs: The cfg of each phase; a tuple has one for each of its steps.
        factors: What the strengths of each phase are multiplied by; 1 without them.

    Returns:
        The parts; the plan itself where no strength changes inside of a phase.
    """
    made: list[Phase] = []
    owners, values, own_cfgs = list[int](), list[float](), list[Cfg]()
    for k, (phase, strength, cfg) in enumerate(zip(plan.phases, strengths, cfgs, strict=True)):
        steps = strength if isinstance(strength, tuple) else (strength,) * len(phase.sigmas)
        runs = [(value, len(list(run))) for value, run in groupby(steps)]
        first = 0
        for number, (value, count) in enumerate(runs, start=1):
            name = phase.name if len(runs) == 1 else f"{phase.name}_{number}"
            made.append(Phase(name, phase.sigmas[first : first + count]))
            own = cfg[first : first + count] if isinstance(cfg, tuple) else cfg
            owners.append(k)
            values.append(value if factors is None else factors[k] * value)
            own_cfgs.append(own[0] if isinstance(own, tuple) and len(own) == 1 else own)
            first += count
    return Parts(plan if len(made) == len(plan) else PhasePlan(tuple(made)), owners, values, own_cfgs)

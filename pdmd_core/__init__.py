"""Phased DMD: phase plans, objectives, rollouts, expert files and expert routing.

Importing this package needs nothing but the standard library: the names below are looked up in their modules when they
are first used, and each module imports what it needs. Inside ComfyUI the package is loaded under another name, so all
imports within are relative.

Examples:
    >>> from pdmd_core import PhasePlan
    >>> PhasePlan.from_steps([2, 2], shift=5.0).boundaries
    (0.8333333333333334,)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .loadable import tell_diffusers

if TYPE_CHECKING:
    from .experts import ExpertsError, PhasedExperts
    from .phases import PhasePlan
    from .pipelines import PhasedPipeline, attach_experts, detach_experts, load_phased_pipeline
    from .scheduler import PhasedDMDScheduler

__version__ = "0.1.0"
"""The version of the package; ``pyproject.toml`` reads it from here."""

_HOMES = {
    "ExpertsError": "experts",
    "PhasePlan": "phases",
    "PhasedDMDScheduler": "scheduler",
    "PhasedExperts": "experts",
    "PhasedPipeline": "pipelines",
    "SchedulerMixin": "scheduler",  # from_pretrained looks for it beside a scheduler that model_index.json names
    "attach_experts": "pipelines",
    "detach_experts": "pipelines",
    "load_phased_pipeline": "pipelines",
}
"""Public name to the module that has it."""

__all__ = [
    "ExpertsError",
    "PhasePlan",
    "PhasedDMDScheduler",
    "PhasedExperts",
    "PhasedPipeline",
    "__version__",
    "attach_experts",
    "detach_experts",
    "load_phased_pipeline",
]


tell_diffusers()


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == __name__.partition(".")[0]:
            raise
        message = f'{name} needs the package {error.name}: pip install "phased-dmd[diffusers]"'
        raise ImportError(message, name=error.name) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

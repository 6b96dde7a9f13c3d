"""The sigmas of a run from the widgets steps and denoise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..pdmd_core.boundary_plan import BoundaryPlan
from ..pdmd_core.noise_level import unshift_sigma
from ..pdmd_core.phases import MAX_STEPS, PhasePlan, PhasePlanError
from ..pdmd_core.sampling import TRAINED_TOLERANCE, sampling_sigmas
from .errors import NodeError

DENOISE = (
    "Less (image to image): starts at the step of the plan that is nearest, or, where none is within 0.06, at one put "
    "between its steps, so that 0.1 is gentle. The time line shows where."
)
"""What the widget does, for its tooltip."""
NEAR = 1 / 16
"""How near, in raw time, a run starts to the denoise that was asked for."""


@dataclass(frozen=True)
class Run:
    """The sigmas of a run, and those that its denoise leaves out."""

    sigmas: list[float]
    """In [0, 1], descending, with the final 0."""
    skipped: list[float]
    """The sigmas of the steps before the first one."""
    start: float | None = None
    """The denoise at which it starts, in raw time; None where it starts from noise or is empty."""

    @classmethod
    def of(cls, plan: PhasePlan) -> Run:
        """Make the plan's own run."""
        return cls(sampling_sigmas(plan), [])


def start_of(plan: PhasePlan, sigma: float) -> float:
    """Compute the raw time of a sigma under the shift of a plan: the denoise that starts there."""
    return unshift_sigma(sigma, plan.shift or 1.0)


def is_trained(plan: PhasePlan, sigma: float) -> bool:
    """Say whether an expert was trained to step from this sigma."""
    return any(math.isclose(sigma, other, rel_tol=TRAINED_TOLERANCE) for other in plan.sigmas)


def nearest_start(plan: PhasePlan, sigma: float) -> float:
    """Look up the denoise below 1 that starts at the trained sigma nearest to this one; 1 where there is none."""
    wanted = start_of(plan, sigma)
    return min((start_of(plan, other) for other in plan.sigmas[1:]), key=lambda start: abs(start - wanted), default=1.0)


def run_of(plan: PhasePlan, steps: int, denoise: float) -> Run:
    """List the sigmas of a run.

    Trained sigmas stay the trained ones wherever the run can start near enough at one of them. Where it cannot, as few
    steps are put between them as it takes (``PhasePlan.refined``): four steps have nothing below a denoise of 0.25.

    Args:
        plan: The plan.
        steps: The number of steps; 0 takes the plan's own.
        denoise: How much of the noise range is sampled, in [0, 1].

    Returns:
        The run.

    Raises:
        NodeError: If these are fewer steps than the plan's, or more than fit between them.
    """
    if steps and not isinstance(plan, BoundaryPlan) and steps < len(plan.sigmas):
        raise NodeError(
            f"steps are at least the {len(plan.sigmas)} that the experts were trained for, or 0: found {steps}"
        )
    try:
        whole, sigmas = sampling_sigmas(plan, steps or None), sampling_sigmas(plan, steps or None, denoise)
    except PhasePlanError:
        if not steps or not 0 <= denoise <= 1:
            raise
        raise NodeError(f"{steps} steps do not fit between the trained ones: take fewer, or 0") from None
    more = len(whole) - 1
    while sigmas and more < MAX_STEPS and abs(start_of(plan, sigmas[0]) - denoise) > NEAR + 1e-9:
        more += 1
        whole, sigmas = sampling_sigmas(plan, more), sampling_sigmas(plan, more, denoise)
    if not sigmas or len(sigmas) == len(whole):
        return Run(sigmas, whole[:-1] if not sigmas else [])
    return Run(sigmas, whole[: len(whole) - len(sigmas)], start_of(plan, sigmas[0]))

"""The sigmas of one sampler run under a phase plan, and what is wrong with sigmas that come from elsewhere.

(Standard library only.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from .boundary_plan import BoundaryPlan
from .noise_level import unshift_sigma
from .phases import BOUNDARY_TOLERANCE, PhasePlan, PhasePlanError

TRAINED_TOLERANCE = 1e-3
"""How close to a trained sigma, relative to it, a sigma still counts as trained. Plans keep their sigmas that far
apart."""


def sampling_sigmas(plan: PhasePlan, steps: int | None = None, denoise: float = 1.0) -> list[float]:
    """List the sigmas of a run, descending and ending at 0.

    Args:
        plan: The plan of the experts.
        steps: The number of steps; None takes the plan's own. More than the plan has go between the trained ones, as in
            ``PhasePlan.refined``; any number under a ``BoundaryPlan``.
        denoise: How much of the noise range is sampled, in [0, 1]. 1 starts from pure noise. Less starts at the sigma
            of the plan whose raw time is nearest to it, so that an image-to-image run stays on trained sigmas. 0 is no
            run at all.

    Returns:
        The sigmas, in [0, 1]; an empty list for a denoise of 0.

    Raises:
        PhasePlanError: If ``denoise`` is outside [0, 1], or if the plan has more steps than asked for.

    Examples:
        >>> from pdmd_core.phases import PhasePlan
        >>> plan = PhasePlan.from_steps([2, 2], shift=3.0)
        >>> sampling_sigmas(plan)
        [1.0, 0.9, 0.75, 0.5, 0.0]
        >>> sampling_sigmas(plan, denoise=0.5)  # image to image
        [0.75, 0.5, 0.0]
    """
    if not (isinstance(denoise, int | float) and 0 <= denoise <= 1):
        raise PhasePlanError(f"denoise is a number in [0, 1], found {denoise!r}")
    if denoise == 0:
        return []
    shift = plan.shift or 1.0
    if isinstance(plan, BoundaryPlan):
        sigmas = plan.schedule(steps)
    else:
        sigmas = [*(plan if steps is None else plan.refined(steps)).sigmas, 0.0]
    distances = [round(abs(unshift_sigma(sigma, shift) - denoise), 9) for sigma in sigmas[:-1]]
    return sigmas[distances.index(min(distances)) :]


def sigma_warnings(plan: PhasePlan, sigmas: Sequence[float]) -> list[str]:
    """Say what is wrong with sampling these sigmas with experts of this plan.

    Args:
        plan: The plan of the experts.
        sigmas: The sigmas of a run, in [0, 1], descending, usually with a final 0. Every sigma but the last is a
            network call.

    Returns:
        One sentence for each fault; an empty list when all is well. No sigma of a ``BoundaryPlan`` is one.
    """
    if len(sigmas) < 2:
        return [f"sigmas of a run are at least two numbers, found {len(sigmas)}: nothing is sampled"]
    if not all(math.isfinite(sigma) and 0 <= sigma <= 1 + BOUNDARY_TOLERANCE for sigma in sigmas):
        return [f"sigmas of flow matching lie in [0, 1], found {max(sigmas):g}: these are not of this kind of model"]
    if any(high <= low for high, low in pairwise(sigmas)):
        return ["sigmas of a run descend, these do not"]
    warnings = []
    trained = () if isinstance(plan, BoundaryPlan) else plan.sigmas
    for step, sigma in enumerate(sigmas[:-1] if trained else ()):
        nearest = min(trained, key=lambda other: abs(other - sigma))
        if not math.isclose(sigma, nearest, rel_tol=TRAINED_TOLERANCE):
            warnings.append(
                f"step {step} is at sigma {sigma:.4f}, where expert {plan.phases[_owner(plan, sigma)].name} was not "
                f"trained to step (its nearest is {nearest:.4f})"
            )
    for boundary in plan.boundaries if trained else ():
        for high, low in pairwise(sigmas):
            above, below = boundary * (1 + TRAINED_TOLERANCE), boundary * (1 - TRAINED_TOLERANCE)
            if high > above and low < below:
                warnings.append(
                    f"the step from {high:.4f} to {low:.4f} jumps over the boundary {boundary:.4f}, where experts "
                    "were trained to hand over"
                )
    used = {_owner(plan, sigma) for sigma in sigmas[:-1]}
    idle = [plan.phases[k].name for k in range(min(used), len(plan)) if k not in used]
    if idle and sigmas[-1] <= BOUNDARY_TOLERANCE:
        warnings.append(f"no step runs expert {', '.join(idle)}")
    return warnings


def _owner(plan: PhasePlan, sigma: float) -> int:
    """Which expert runs at this sigma; the last one at 0."""
    return plan.phase_index(max(sigma, BOUNDARY_TOLERANCE))

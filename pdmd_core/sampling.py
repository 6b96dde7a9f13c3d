"""The sigmas of one sampler run under a phase plan, and what is wrong with sigmas that come from elsewhere.

(Standard library only.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from .phases import BOUNDARY_TOLERANCE, PhasePlan, PhasePlanError, unshift_sigma

TRAINED_TOLERANCE = 1e-3
"""Relative. Sigmas this close to a trained one count as the trained one; plans keep their sigmas that far apart."""


def sampling_sigmas(plan: PhasePlan, steps: int | None = None, denoise: float = 1.0) -> list[float]:
    """The descending sigmas of a run, ending at 0: ``[1, .9375, .8333, .625, 0]``.

    steps:   more of them than the plan has go between the trained ones (``PhasePlan.refined``).
    denoise: in [0, 1]; 1 starts from noise. Less starts at the sigma of the plan whose raw time is nearest to it, so
             that an image to image run stays on trained sigmas; 0 is no run at all (an empty list).

    Raises PhasePlanError.
    """
    if not (isinstance(denoise, int | float) and 0 <= denoise <= 1):
        raise PhasePlanError(f"denoise is a number in [0, 1], found {denoise!r}")
    if denoise == 0:
        return []
    shift = plan.shift or 1.0
    sigmas = [*(plan if steps is None else plan.refined(steps)).sigmas, 0.0]
    distances = [round(abs(unshift_sigma(sigma, shift) - denoise), 9) for sigma in sigmas[:-1]]
    return sigmas[distances.index(min(distances)) :]


def sigma_warnings(plan: PhasePlan, sigmas: Sequence[float]) -> list[str]:
    """What to know before sampling these sigmas with experts of this plan, a sentence each; empty when all is well.

    sigmas: descending, as samplers take them, usually with a final 0. Every sigma but the last is a network call.
    """
    if len(sigmas) < 2:
        return [f"sigmas of a run are at least two numbers, found {len(sigmas)}: nothing is sampled"]
    if not all(math.isfinite(sigma) and 0 <= sigma <= 1 + BOUNDARY_TOLERANCE for sigma in sigmas):
        return [f"sigmas of flow matching lie in [0, 1], found {max(sigmas):g}: these are not of this kind of model"]
    if any(high <= low for high, low in pairwise(sigmas)):
        return ["sigmas of a run descend, these do not"]
    warnings = []
    trained = plan.sigmas
    for step, sigma in enumerate(sigmas[:-1]):
        nearest = min(trained, key=lambda other: abs(other - sigma))
        if not math.isclose(sigma, nearest, rel_tol=TRAINED_TOLERANCE):
            warnings.append(
                f"step {step} is at sigma {sigma:.4f}, where expert {plan.phases[_owner(plan, sigma)].name} was not "
                f"trained to step (its nearest is {nearest:.4f})"
            )
    for boundary in plan.boundaries:
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
    return plan.phase_index(max(sigma, BOUNDARY_TOLERANCE))

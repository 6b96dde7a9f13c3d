"""Plans of undistilled bases of several networks: a boundary, and any number of steps.

(Standard library only.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .noise_level import shift_sigma
from .phases import MAX_STEPS, PhasePlan, PhasePlanError

WAN22_BOUNDARIES = {"Wan2.2 text to video": 0.875, "Wan2.2 image to video": 0.9, "half the steps": None}
"""What the boundary belongs to, to its sigma; None is half of the steps, wherever the shift puts that."""


@dataclass(frozen=True)
class BoundaryPlan(PhasePlan):
    """A plan that says where networks hand over and nothing of steps: no sigma is better trained than another.

    The phases hold their first sigma alone, which routes as in any plan. Wan 2.2 as released is such a base: its two
    networks meet at sigma 0.875 (text to video) or 0.9 (image to video), whatever steps and shift are
    (``boundary`` in ``wan/configs`` of https://github.com/Wan-Video/Wan2.2).

    Examples:
        >>> plan = BoundaryPlan.at([0.875], steps=4, shifts=[5.0])
        >>> plan.schedule()
        [1.0, 0.9375, 0.8333333333333334, 0.625, 0.0]
        >>> [plan.phases[plan.phase_index(sigma)].name for sigma in (0.9, 0.875)]
        ['high_noise', 'low_noise']
    """

    steps: int = 20
    """The number of steps of a run that does not say another."""
    shifts: tuple[float, ...] = (1.0,)
    """The shift of each phase, or one for all."""

    @classmethod
    def at(
        cls,
        boundaries: Sequence[float | None],
        steps: int,
        shifts: Sequence[float],
        names: Sequence[str] | None = None,
    ) -> BoundaryPlan:
        """Make a plan of its boundaries.

        Args:
            boundaries: The sigmas at which the next network takes over, descending; None is half of the steps, which is
                the sigma of raw time 0.5.
            steps: The number of steps of a run that does not say another.
            shifts: One shift, or one for each phase.
            names: One name for each phase; None takes default names such as high_noise and low_noise.

        Returns:
            The plan.

        Raises:
            PhasePlanError: If these do not make a plan.
        """
        phases = len(boundaries) + 1
        if isinstance(steps, bool) or not isinstance(steps, int) or not phases <= steps <= MAX_STEPS:
            raise PhasePlanError(f"steps are a whole number from {phases} (the phases) to {MAX_STEPS}, found {steps!r}")
        if len(shifts) not in (1, phases) or not all(math.isfinite(shift) and shift > 0 for shift in shifts):
            raise PhasePlanError(f"shift is one positive number or one for each of {phases} phases, found {shifts!r}")
        starts = [1.0, *(shift_sigma(0.5, shifts[0]) if sigma is None else float(sigma) for sigma in boundaries)]
        made = PhasePlan.from_sigmas([[start] for start in starts], names)
        return cls(made.phases, steps, tuple(map(float, shifts)))

    @property
    def shift(self) -> float | None:
        """The shift of all phases; None where they differ."""
        return self.shifts[0] if len(set(self.shifts)) == 1 else None

    def schedule(self, steps: int | None = None) -> list[float]:
        """List the sigmas of a run: uniform in raw time, then shifted.

        With a shift for each phase, a phase has the steps that lie in its interval under its own shift; the number of
        all may then differ by some from what was asked for.

        Args:
            steps: The number of steps; None takes the plan's own.

        Returns:
            Sigmas, descending from 1 to 0.

        Raises:
            PhasePlanError: If there is no step, or are too many.
        """
        count = self.steps if steps is None else steps
        if not 1 <= count <= MAX_STEPS:
            raise PhasePlanError(f"steps are a whole number from 1 to {MAX_STEPS}, found {count!r}")
        found: list[float] = []
        for k in range(len(self)):
            shift = self.shifts[k % len(self.shifts)]
            sigmas = [shift_sigma(1 - n / count, shift) for n in range(count)]
            found += [sigma for sigma in sigmas if self.phase_index(sigma) == k]
        return [*found, 0.0]

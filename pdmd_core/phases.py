"""The phase plan: which expert runs at which noise level.

Trainer, expert files, diffusers scheduler and ComfyUI nodes all route by this one object. The only coordinate is sigma
in [0, 1], where ``x_sigma = (1 - sigma) * x_0 + sigma * noise``. Shift is applied once, when a plan is made from raw
times; afterwards only sigmas exist. (Phased DMD, arXiv 2510.27684, section 3.)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .noise_level import shift_sigma, unshift_sigma
from .presets import find_preset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BOUNDARY_TOLERANCE = 1e-4
"""How close above a boundary, relative to it, a sigma still counts as the boundary. float32 and a trip through
``sigma * 1000`` stay within it. bfloat16 does not (its spacing is up to 0.8 %): keep sigmas in float32 or route by
step."""

MAX_STEPS = 1000
"""The most steps of a plan. A teacher's full schedule is within it, and the plan of an untrusted file stays cheap to
handle."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


class PhasePlanError(ValueError):
    """An invalid phase plan: one line that says what was expected and what was found."""


@dataclass(frozen=True)
class Phase:
    """One subinterval of the noise range and the expert that owns it."""

    name: str
    """The name of the expert and of its file: lower-case letters, digits and underscores."""
    sigmas: tuple[float, ...]
    """The sigmas at which the expert is called, descending, in (0, 1]."""


@dataclass(frozen=True)
class PhasePlan:
    """Phases in the order of sampling, high noise first; immutable and hashable.

    Expert k owns the half-open interval (end_k, start_k]: a sigma on a boundary belongs to the later expert. The end of
    a phase is the first sigma of the next one; the last phase ends at 0. Source: Phased DMD, arXiv 2510.27684, section
    3.

    Raises:
        PhasePlanError: If the phases do not make a plan.

    Examples:
        >>> plan = PhasePlan.from_steps([2, 2], shift=3.0)
        >>> plan.sigmas
        (1.0, 0.9, 0.75, 0.5)
        >>> plan.boundaries
        (0.75,)
        >>> plan.phases[plan.phase_index(0.8)].name
        'high_noise'
        >>> plan.phase_index(0.75)  # the boundary belongs to the later expert
        1
    """

    phases: tuple[Phase, ...]
    """At least one phase; the first starts at sigma 1 and all sigmas descend."""

    def __post_init__(self) -> None:
        """Check names, sigmas and their order.

        Raises:
            PhasePlanError: If the phases do not make a plan.
        """
        if not isinstance(self.phases, tuple) or not all(isinstance(phase, Phase) for phase in self.phases):
            raise PhasePlanError(f"the phases of a plan are a tuple of Phase, found {_short(self.phases)}: from_sigmas")
        if not self.phases:
            raise PhasePlanError("a phase plan needs at least one phase, found none")
        names = [phase.name for phase in self.phases]
        for phase in self.phases:
            if not isinstance(phase.name, str) or not _NAME.fullmatch(phase.name):
                raise PhasePlanError(
                    f"a phase name is 1 to 64 lower-case letters, digits and underscores and starts with a letter, "
                    f"found {_short(phase.name)}"
                )
            if not isinstance(phase.sigmas, tuple):
                raise PhasePlanError(f"the sigmas of a Phase are a tuple, found {_short(phase.sigmas)}: from_sigmas")
            if not phase.sigmas:
                raise PhasePlanError(f"phase {phase.name!r} has no sigmas: every expert runs at least one step")
        if len(self.sigmas) > MAX_STEPS:
            raise PhasePlanError(f"a plan has at most {MAX_STEPS} steps, found {len(self.sigmas)}")
        if len(set(names)) != len(names):
            raise PhasePlanError(f"phase names must differ, found {_short(', '.join(names))}")
        for sigma in self.sigmas:
            if isinstance(sigma, bool) or not isinstance(sigma, float) or not 0 < sigma <= 1:
                raise PhasePlanError(
                    f"sigmas are numbers in (0, 1], found {_short(sigma)} (timesteps in 0..1000 are not)"
                )
        if self.sigmas[0] != 1:
            raise PhasePlanError(f"the first sigma is 1 (sampling starts from pure noise), found {self.sigmas[0]}")
        for high, low in zip(self.sigmas, self.sigmas[1:], strict=False):
            if high <= low * (1 + 10 * BOUNDARY_TOLERANCE):
                raise PhasePlanError(
                    f"sigmas must descend over the whole plan, by at least 0.1 %, found {high} before {low}"
                )

    @classmethod
    def from_steps(cls, steps: Sequence[int], shift: float = 1.0, names: Sequence[str] | None = None) -> PhasePlan:
        """Make a plan whose steps are uniform in raw time, then shifted.

        Args:
            steps: The number of steps of each phase, high noise first.
            shift: The timestep shift, above 0; it is applied here and nowhere else.
            names: One name for each phase; None takes default names such as high_noise and low_noise.

        Returns:
            The plan.

        Raises:
            PhasePlanError: If a number of steps is below 1, the shift is not above 0, or the names do not fit.

        Examples:
            >>> PhasePlan.from_steps([2, 2], shift=5.0).sigmas  # the 4-step plan of Wan
            (1.0, 0.9375, 0.8333333333333334, 0.625)
        """
        if not isinstance(steps, Sequence) or not steps or not all(_is_count(n) for n in steps):
            raise PhasePlanError(f"steps are whole numbers of at least 1, one for each phase, found {_short(steps)}")
        if not (isinstance(shift, int | float) and math.isfinite(shift) and shift > 0):
            raise PhasePlanError(f"shift is a positive number, found {shift!r}")
        total = sum(steps)
        if total > MAX_STEPS:
            raise PhasePlanError(f"a plan has at most {MAX_STEPS} steps, found {_short(total)}")
        flat = [shift_sigma(1 - i / total, float(shift)) for i in range(total)]
        starts = [sum(steps[:k]) for k in range(len(steps))]
        return cls.from_sigmas([flat[a : a + n] for a, n in zip(starts, steps, strict=True)], names)

    @classmethod
    def from_sigmas(cls, sigmas: Sequence[Sequence[float]], names: Sequence[str] | None = None) -> PhasePlan:
        """Make a plan from the sigmas of each phase.

        Args:
            sigmas: The sigmas of each phase, as in ``[[1.0, 0.9375], [0.8333, 0.625]]``: in (0, 1], the first 1,
                descending over the whole plan, without the final 0.
            names: One name for each phase; None takes default names such as high_noise and low_noise.

        Returns:
            The plan.

        Raises:
            PhasePlanError: If the sigmas or the names do not make a plan.
        """
        try:
            groups = [tuple(float(sigma) for sigma in group) for group in sigmas]
        except (TypeError, ValueError, OverflowError):
            raise PhasePlanError(
                f"sigmas are given as one list of numbers for each phase, found {_short(sigmas)}"
            ) from None
        names = list(names) if names is not None else _default_names(len(groups))
        if len(names) != len(groups):
            raise PhasePlanError(f"expected one name for each of the {len(groups)} phases, found {len(names)}")
        return cls(tuple(Phase(name, group) for name, group in zip(names, groups, strict=True)))

    @classmethod
    def preset(cls, name: str) -> PhasePlan:
        """Make the plan of a well-known few-step file or model that others released.

        Args:
            name: Its name in ``presets.PRESETS``, which ``phased-dmd plan --list`` lists.

        Returns:
            The plan; the preset itself also has guidance, files and where that is said.

        Raises:
            PhasePlanError: If there is no such preset.

        Examples:
            >>> PhasePlan.preset("wan2.2-lightx2v-4step").boundaries
            (0.8333333333333334,)
        """
        try:
            found = find_preset(name)
        except ValueError as error:
            raise PhasePlanError(str(error)) from None
        return cls.from_steps(found.steps, found.shift) if found.shift else cls.from_sigmas(found.sigmas)

    def __len__(self) -> int:
        """Count the phases.

        Returns:
            The number of phases.
        """
        return len(self.phases)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """All sigmas at which a network is called, descending, without the final 0."""
        return tuple(sigma for phase in self.phases for sigma in phase.sigmas)

    @property
    def boundaries(self) -> tuple[float, ...]:
        """The sigmas at which the next expert takes over: the first sigma of every phase but the first."""
        return tuple(phase.sigmas[0] for phase in self.phases[1:])

    def interval(self, k: int) -> tuple[float, float]:
        """Look up the noise range that an expert owns.

        Args:
            k: The index of the phase, from 0.

        Returns:
            The sigmas (end, start): the expert owns end < sigma <= start.

        Raises:
            PhasePlanError: If there is no such phase.
        """
        if not 0 <= k < len(self.phases):
            raise PhasePlanError(f"phase index {k} is not in 0..{len(self.phases) - 1}")
        end = self.phases[k + 1].sigmas[0] if k + 1 < len(self.phases) else 0.0
        return end, self.phases[k].sigmas[0]

    def phase_index(self, sigma: float) -> int:
        """Look up which expert runs at a noise level.

        Args:
            sigma: Sigma, in (0, 1].

        Returns:
            The index of the phase, from 0.

        Raises:
            PhasePlanError: If sigma is outside (0, 1].
        """
        if not 0 < sigma <= 1 + BOUNDARY_TOLERANCE:
            raise PhasePlanError(f"sigma to route is in (0, 1], found {sigma!r} (divide timesteps by 1000)")
        return sum(sigma <= boundary * (1 + BOUNDARY_TOLERANCE) for boundary in self.boundaries)

    @property
    def shift(self) -> float | None:
        """The shift that makes the steps uniform in raw time; None when no shift does."""
        sigmas = self.sigmas
        if len(sigmas) == 1:
            return 1.0
        raw = 1 - 1 / len(sigmas)
        shift = sigmas[1] * (1 - raw) / (raw * (1 - sigmas[1]))
        uniform = [shift_sigma(1 - i / len(sigmas), shift) for i in range(len(sigmas))]
        matches = all(math.isclose(a, b, rel_tol=BOUNDARY_TOLERANCE) for a, b in zip(sigmas, uniform, strict=True))
        return shift if matches else None

    def refined(self, steps: int) -> PhasePlan:
        """Make this plan with more steps: every trained sigma stays, others are put between them, inside phases.

        Each further step goes where the gap in raw time is widest (the noisier one of equal gaps), and the steps within
        a gap are uniform in raw time, under the shift of the plan (in sigma where no shift makes it uniform).

        Args:
            steps: The number of steps of the new plan.

        Returns:
            The refined plan, with the same phases and boundaries.

        Raises:
            PhasePlanError: If the plan has more steps than asked for, or if a gap is too narrow for another sigma.
        """
        if not _is_count(steps) or steps < len(self.sigmas):
            raise PhasePlanError(
                f"a refined plan has at least the {len(self.sigmas)} steps of the plan, found {_short(steps)}"
            )
        if steps > MAX_STEPS:
            raise PhasePlanError(f"a plan has at most {MAX_STEPS} steps, found {_short(steps)}")
        shift = self.shift or 1.0
        edges = [unshift_sigma(sigma, shift) for sigma in (*self.sigmas, 0.0)]
        gaps = [high - low for high, low in pairwise(edges)]
        parts = [1] * len(gaps)
        for _ in range(steps - len(parts)):
            # rounded, so that gaps that are equal but for their last bits count as equal
            widest = max(range(len(parts)), key=lambda i: (round(gaps[i] / parts[i], 9), -i))
            parts[widest] += 1
        phases, step = [], 0
        for phase in self.phases:
            sigmas: list[float] = []
            for sigma in phase.sigmas:
                between = (edges[step] - gaps[step] * i / parts[step] for i in range(1, parts[step]))
                sigmas += [sigma, *(shift_sigma(raw, shift) for raw in between)]
                step += 1
            phases.append(Phase(phase.name, tuple(sigmas)))
        return PhasePlan(tuple(phases))

    def to_dict(self) -> dict[str, Any]:
        """Write the plan in its one JSON form.

        Returns:
            ``{"phases": [{"name": ..., "sigmas": [...]}, ...]}``.
        """
        return {"phases": [{"name": phase.name, "sigmas": list(phase.sigmas)} for phase in self.phases]}

    @classmethod
    def from_dict(cls, data: object) -> PhasePlan:
        """Read a plan from its JSON form; anything else in the data is refused.

        Args:
            data: What ``to_dict`` returns.

        Returns:
            The plan.

        Raises:
            PhasePlanError: If the data has another form or its phases do not make a plan.
        """
        phases = _entries(data, {"phases"}, "a phase plan")["phases"]
        if not isinstance(phases, list):
            raise PhasePlanError(f"the phases of a plan are a list, found {type(phases).__name__}")
        entries = [_entries(phase, {"name", "sigmas"}, "a phase") for phase in phases]
        for entry in entries:
            if not isinstance(entry["sigmas"], list):
                raise PhasePlanError(f"the sigmas of a phase are a list, found {type(entry['sigmas']).__name__}")
            if any(isinstance(sigma, bool) or not isinstance(sigma, int | float) for sigma in entry["sigmas"]):
                raise PhasePlanError(f"sigmas are numbers in (0, 1], found {_short(entry['sigmas'])}")
        return cls.from_sigmas([entry["sigmas"] for entry in entries], [entry["name"] for entry in entries])

    def to_json(self) -> str:
        """Write the plan as JSON text; floats survive exactly.

        Returns:
            ``to_dict`` as text.
        """
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> PhasePlan:
        """Read a plan from JSON text.

        Args:
            text: What ``to_json`` returns.

        Returns:
            The plan.

        Raises:
            PhasePlanError: If the text is not JSON or not that of a plan.
        """
        try:
            data = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise PhasePlanError(f"a phase plan is JSON, found text that is not: {error}") from None
        return cls.from_dict(data)

    def describe(self) -> str:
        """Write the plan as a text table; see ``plan_view.describe_plan``.

        Returns:
            One line for each step between a header and a summary.
        """
        from .plan_view import describe_plan

        return describe_plan(self)

    def plot(self) -> Figure:
        """Draw the plan as a time line; see ``plan_view.plot_plan``.

        Returns:
            A figure of matplotlib.
        """
        from .plan_view import plot_plan

        return plot_plan(self)


def _default_names(count: int) -> list[str]:
    known = {1: ["all_noise"], 2: ["high_noise", "low_noise"], 3: ["high_noise", "middle_noise", "low_noise"]}
    return known.get(count, [f"phase_{k}" for k in range(count)])


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _short(value: object) -> str:
    """What was found, in one line of at most 80 characters."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # a number of thousands of digits; lists in lists in lists
        text = type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def _entries(data: object, keys: Iterable[str], what: str) -> Mapping[str, Any]:
    if not isinstance(data, dict) or set(data) != set(keys):
        found = f"keys {_short(sorted(map(str, data)))}" if isinstance(data, dict) else type(data).__name__
        raise PhasePlanError(f"{what} is an object with exactly the keys {sorted(keys)}, found {found}")
    return data

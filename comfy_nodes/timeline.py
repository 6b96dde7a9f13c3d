"""A run under a phase plan as a time line: what the front end draws, words, and a picture with PIL.

A step has one cell, so that steps at high noise, whose sigmas lie close together, can be read as well as any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..pdmd_core.boundary_plan import BoundaryPlan
from ..pdmd_core.noise_level import signal_to_noise
from ..pdmd_core.phases import PhasePlan
from ..pdmd_core.sampling import sampling_sigmas
from .language import said
from .runs import Run, is_trained
from .widget_text import Cfg, cfg_at

if TYPE_CHECKING:
    from PIL import Image, ImageFont

COLOURS = ("#3b6fb6", "#c9762b", "#3f9b6e", "#9a57a8", "#b64646", "#6b7a1f", "#2b8c99", "#8a6d3b")
"""Colours of the phases, in order."""
_BACKGROUND, _INK, _FAINT, _WARNING = "#1f2227", "#f2f2f2", "#9aa0a8", "#ffb454"
_WIDTH, _HEIGHT, _MARGIN = 1600, 220, 16


def timeline(
    plan: PhasePlan,
    cfgs: Sequence[Cfg] | None = None,
    run: Run | None = None,
    strengths: Sequence[float | None] | None = None,
    note: str | None = None,
) -> dict[str, Any]:
    """Describe a run as JSON for the front end.

    Args:
        plan: The plan.
        cfgs: The cfg of each phase, where None is the sampler's; None for all.
        run: The run; None takes the plan's own.
        strengths: The strength of the LoRA of each phase, where None is no LoRA; None for all.
        note: What to do about the run, short enough for a line under its cells.

    Returns:
        Phases with name, interval (end, start], colour and strength; steps with sigma, phase, cfg, and whether they are
        trained and skipped; the shift; whether the plan is of a boundary alone; the denoise at which a run starts; the
        note.
    """
    phases: list[dict[str, Any]] = []
    for k, phase in enumerate(plan.phases):
        end, start = plan.interval(k)
        entry = {"name": phase.name, "start": start, "end": end, "colour": COLOURS[k % len(COLOURS)]}
        phases.append({**entry, "strength": strengths[k] if strengths else None})
    run = Run.of(plan) if run is None else run
    steps = [_step(plan, cfgs, sigma, skipped=True) for sigma in run.skipped]
    steps += [_step(plan, cfgs, sigma, skipped=False) for sigma in run.sigmas[:-1]]
    about = {
        "shift": plan.shift,
        "any_steps": isinstance(plan, BoundaryPlan),
        "start": run.start,
        "note": note and said(note),
    }
    return {"phases": phases, "steps": steps, **about}


def _step(plan: PhasePlan, cfgs: Sequence[Cfg] | None, sigma: float, skipped: bool) -> dict[str, Any]:
    k = plan.phase_index(min(sigma, 1.0)) if sigma > 0 else len(plan) - 1
    trained = isinstance(plan, BoundaryPlan) or is_trained(plan, sigma)
    cfg = cfg_at(plan, k, cfgs[k], sigma) if cfgs else None
    return {"sigma": sigma, "phase": k, "cfg": cfg, "trained": trained, "skipped": skipped}


def report(
    plan: PhasePlan,
    sigmas: Sequence[float] | None = None,
    warnings: Sequence[str] = (),
    cfgs: Sequence[Cfg] | None = None,
) -> str:
    """Say in words what is wrong with a run, then which expert runs which step at which sigma and SNR.

    Args:
        plan: The plan.
        sigmas: The sigmas of a run, in [0, 1]; None takes the plan's.
        warnings: What is wrong with the run.
        cfgs: The cfg of each phase, where None is the sampler's; None for all.

    Returns:
        The warnings, one line for each step, and a summary.
    """
    run = list(sigmas) if sigmas is not None else sampling_sigmas(plan)
    lines = [f"Warning: {warning}" for warning in warnings]
    for step, sigma in enumerate(run[:-1], start=1):
        if not 0 < sigma <= 1:
            continue
        k = plan.phase_index(sigma)
        cfg = cfg_at(plan, k, cfgs[k], sigma) if cfgs else None
        snr = signal_to_noise(sigma)
        log = f"{math.log(snr):+.2f}" if snr > 0 else "-inf"
        guidance = "" if cfg is None else f"  cfg {cfg:g}"
        lines.append(f"step {step}  {plan.phases[k].name}  sigma {sigma:.4f}  log-SNR {log}{guidance}")
    shift = f"shift {plan.shift:.4g}" if plan.shift is not None else "no single shift"
    if isinstance(plan, BoundaryPlan):
        boundaries = ", ".join(f"{boundary:.4g}" for boundary in plan.boundaries)
        return "\n".join([*lines, f"{len(plan)} phases, boundary {boundaries}, any number of steps, {shift}"])
    return "\n".join([*lines, f"{len(plan)} phase(s), {len(plan.sigmas)} trained step(s), {shift}"])


def draw(plan: PhasePlan, sigmas: Sequence[float] | None = None, cfgs: Sequence[Cfg] | None = None) -> Image.Image:
    """Draw a run: a cell for each step, from noise (left) to data (right), under the names of its experts.

    Args:
        plan: The plan.
        sigmas: The sigmas of a run, in [0, 1]; None takes the plan's.
        cfgs: The cfg of each phase, where None is the sampler's; None for all.

    Returns:
        The picture; a sigma that no expert was trained at stands out.
    """
    from PIL import Image, ImageDraw

    described = timeline(plan, cfgs, None if sigmas is None else Run(list(sigmas), []))
    steps, phases = described["steps"], described["phases"]
    image = Image.new("RGB", (_WIDTH, _HEIGHT), _BACKGROUND)
    pen, width = ImageDraw.Draw(image), (_WIDTH - 2 * _MARGIN) / max(len(steps), 1)
    large, small = _font(34), _font(26)
    for n, step in enumerate(steps):
        left, right = _MARGIN + n * width, _MARGIN + (n + 1) * width
        pen.rectangle((left + 1, 20, right - 2, 160), fill=phases[step["phase"]]["colour"])
        middle, ink = (left + right) / 2, _INK if step["trained"] else _WARNING
        pen.text((middle, 118), _shortened(f"{step['sigma']:.4f}", large, width - 8), ink, large, anchor="mm")
        if step["cfg"] is not None:
            words = _shortened(f"cfg {step['cfg']:g}", small, width - 6)
            pen.text((middle, 188), words, _FAINT, small, anchor="mm")
    for first, count in runs_of([step["phase"] for step in steps]):
        left, room = _MARGIN + first * width, count * width
        name = _shortened(phases[steps[first]["phase"]]["name"], large, room - 12)
        pen.text((left + room / 2, 58), name, _INK, large, anchor="mm")
    return image


def runs_of(values: Sequence[int]) -> list[tuple[int, int]]:
    """Find runs of equal neighbours.

    Args:
        values: Any values.

    Returns:
        The index of each run's first value, and their number.
    """
    starts = [n for n, value in enumerate(values) if n == 0 or values[n - 1] != value]
    return [(start, end - start) for start, end in pairwise([*starts, len(values)])]


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size
        return ImageFont.load_default()


def _shortened(text: str, font: Any, width: float) -> str:
    """Shorten a text to an ellipsis where it has no room; nothing where even that has none."""
    short = text
    while short and font.getlength(short) > width:
        text = text[:-1]
        short = f"{text}\u2026" if text else ""
    return short

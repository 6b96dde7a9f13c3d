"""A phase plan as a time line: what the front end draws, and the same as a picture with PIL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..pdmd_core.noise_level import signal_to_noise
from ..pdmd_core.phases import PhasePlan

if TYPE_CHECKING:
    from PIL import Image, ImageFont

COLOURS = ("#3b6fb6", "#c9762b", "#3f9b6e", "#9a57a8", "#b64646", "#6b7a1f", "#2b8c99", "#8a6d3b")
"""Colours of the phases, in order."""
_BACKGROUND, _INK, _FAINT, _WARNING = "#1f2227", "#f2f2f2", "#9aa0a8", "#ffb454"
_WIDTH, _MARGIN, _BAR, _LINE, _FONT = 960, 36, 92, 26, 17


def timeline(plan: PhasePlan, cfgs: Sequence[float | None] | None = None) -> dict[str, Any]:
    """Describe a plan as JSON for the front end.

    Args:
        plan: The plan.
        cfgs: The cfg of each phase, where None is the sampler's; None for all.

    Returns:
        Phases with name, interval (end, start], sigmas, colour and cfg; the number of steps; the shift.
    """
    phases = []
    for k, phase in enumerate(plan.phases):
        end, start = plan.interval(k)
        cfg = cfgs[k] if cfgs else None
        colour = COLOURS[k % len(COLOURS)]
        phases.append(
            {"name": phase.name, "start": start, "end": end, "sigmas": [*phase.sigmas], "colour": colour, "cfg": cfg}
        )
    return {"phases": phases, "steps": len(plan.sigmas), "shift": plan.shift}


def report(
    plan: PhasePlan,
    sigmas: Sequence[float] | None = None,
    warnings: Sequence[str] = (),
    cfgs: Sequence[float | None] | None = None,
) -> str:
    """Say in words which expert runs which step at which sigma and SNR, then the warnings.

    Args:
        plan: The plan.
        sigmas: The sigmas of a run, in [0, 1]; None takes the plan's.
        warnings: What is wrong with the run.
        cfgs: The cfg of each phase, where None is the sampler's; None for all.

    Returns:
        One line for each step, a summary and the warnings.
    """
    steps = list(sigmas) if sigmas is not None else [*plan.sigmas, 0.0]
    lines = []
    for step, (sigma, after) in enumerate(pairwise(steps)):
        if not 0 < sigma <= 1:
            continue
        k = plan.phase_index(sigma)
        cfg = f"  cfg {cfgs[k]:g}" if cfgs and cfgs[k] is not None else ""
        snr = signal_to_noise(sigma)
        log = f"{math.log(snr):+.2f}" if snr > 0 else "-inf"
        lines.append(f"step {step}  sigma {sigma:.4f} to {after:.4f}  log-SNR {log}  expert {plan.phases[k].name}{cfg}")
    shift = f"shift {plan.shift:.4g}" if plan.shift is not None else "no single shift"
    lines.append(f"{len(plan)} phase(s), {len(plan.sigmas)} trained step(s), {shift}")
    return "\n".join([*lines, *(f"Warning: {warning}" for warning in warnings)])


def draw(plan: PhasePlan, text: str, sigmas: Sequence[float] | None = None) -> Image.Image:
    """Draw the time line from noise (left) to data (right), with a text below.

    Args:
        plan: The plan, whose trained sigmas are dots.
        text: The text.
        sigmas: The sigmas of a run, in [0, 1], which are ticks.

    Returns:
        The picture.
    """
    from PIL import Image, ImageDraw

    font, small = _font(_FONT), _font(14)
    lines = [part for line in text.splitlines() for part in _wrapped(line, font, _WIDTH - 2 * _MARGIN)]
    top, bar = 30, 30 + _BAR
    image = Image.new("RGB", (_WIDTH, bar + 66 + _LINE * len(lines)), _BACKGROUND)
    pen = ImageDraw.Draw(image)

    def x(sigma: float) -> float:
        return _MARGIN + (1 - sigma) * (_WIDTH - 2 * _MARGIN)

    for phase in timeline(plan)["phases"]:
        left, right = x(phase["start"]), x(phase["end"])
        pen.rectangle((left, top, right, bar), fill=phase["colour"])
        label = _shortened(phase["name"], font, right - left - 8)
        pen.text(((left + right) / 2, top + 22), label, _INK, font, anchor="mm")
    pen.line((x(1), top + 58, x(0), top + 58), _INK, 2)
    last = -math.inf
    for sigma in plan.sigmas:
        pen.ellipse((x(sigma) - 6, top + 52, x(sigma) + 6, top + 64), _INK)
        if x(sigma) - last > 46:
            pen.text((x(sigma), bar + 14), f"{sigma:.4g}", _FAINT, small, anchor="mm")
            last = x(sigma)
    for sigma in sigmas or ():
        if 0 <= sigma <= 1:
            pen.line((x(sigma), top + 44, x(sigma), top + 74), _WARNING, 3)
    pen.text((x(1), 14), "noise", _FAINT, small, anchor="lm")
    pen.text((x(0), 14), "data", _FAINT, small, anchor="rm")
    for n, line in enumerate(lines):
        colour = _WARNING if line.startswith(("Warning", " ")) else _INK
        pen.text((_MARGIN, bar + 48 + _LINE * n), line, colour, font)
    return image


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size
        return ImageFont.load_default()


def _wrapped(line: str, font: Any, width: float) -> list[str]:
    """Break a line at spaces; what follows is indented, which also marks it as the rest of a warning."""
    lines, indent = [line], " " * 4
    while font.getlength(lines[-1]) > width and " " in lines[-1].strip():
        words, rest = lines[-1].split(" "), list[str]()
        while len(words) > 1 and font.getlength(" ".join(words)) > width:
            rest.insert(0, words.pop())
        if not " ".join(words).strip():
            break
        lines[-1:] = [" ".join(words), indent + " ".join(rest)]
    return lines


def _shortened(text: str, font: Any, width: float) -> str:
    """Shorten a text to an ellipsis where it has no room; nothing where even that has none."""
    short = text
    while short and font.getlength(short) > width:
        text = text[:-1]
        short = f"{text}\u2026" if text else ""
    return short

"""Plots of a run as SVG texts that stand inside a page.

Drawn by hand, because they are drawn again at every validation: matplotlib takes seconds for what takes milliseconds.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from pdmd_core.phases import PhasePlan

Point = tuple[float, float]
Curves = Mapping[str, Sequence[Point]]
"""Points (update, value) by label."""

_COLOURS = ("#1f77b4", "#d95f02", "#2a9d5c", "#9467bd")
_WIDTH, _HEIGHT = 400, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 10, 34, 22


def curves(panels: Mapping[str, Curves], phases: Sequence[tuple[str, int]], logarithmic: Sequence[str] = ()) -> str:
    """One plot for each panel over the updates; none of a panel without points.

    phases: name and first update of each, marked in every plot. logarithmic: titles of panels with such a scale.
    """
    found = []
    for title, lines in panels.items():
        log = title in logarithmic
        finite = {
            label: [(x, y) for x, y in p if math.isfinite(y) and (y > 0 or not log)] for label, p in lines.items()
        }
        if any(finite.values()):
            found.append(_panel(title, finite, phases, log))
    return "".join(found)


def timeline(plan: PhasePlan) -> str:
    """The phases over sigma, high noise at the left, with the sigmas at which their experts are called."""
    width, height = 1180, 74

    def x(sigma: float) -> float:
        return 10 + (1 - sigma) * (width - 20)

    parts = []
    for k, phase in enumerate(plan.phases):
        end, start = plan.interval(k)
        colour = _COLOURS[k % len(_COLOURS)]
        place = f'x="{x(start):.1f}" y="4" width="{x(end) - x(start):.1f}" height="46"'
        parts.append(f'<rect {place} fill="{colour}" opacity=".18"/>')
        parts.append(_text((x(start) + x(end)) / 2, 20, phase.name, "middle"))
        for sigma in phase.sigmas:
            parts.append(f'<circle cx="{x(sigma):.1f}" cy="38" r="4" fill="{colour}"/>')
            parts.append(_text(x(sigma), 66, f"{sigma:.4g}", "start" if sigma == 1 else "middle"))
    parts.append(_text(x(0), 66, "sigma 0", "end"))
    return _svg(width, height, parts)


def _panel(title: str, lines: Curves, phases: Sequence[tuple[str, int]], log: bool) -> str:
    every = [point for points in lines.values() for point in points]
    low_x, high_x = min(x for x, _ in every), max(x for x, _ in every)
    values = [math.log10(y) if log else y for _, y in every]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = low - margin, high + margin
    inner_width, inner_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> Point:
        value = math.log10(y) if log else y
        along = (x - low_x) / ((high_x - low_x) or 1)
        return _LEFT + along * inner_width, _TOP + (high - value) / (high - low) * inner_height

    parts = [_text(_LEFT, 12, title, "start", bold=True)]
    for tick in _ticks(low, high):
        y = place(low_x, 10**tick if log else tick)[1]
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        parts.append(_text(_LEFT - 5, y + 3, f"{10**tick if log else tick:.3g}", "end"))
    for tick in _ticks(low_x, high_x):
        parts.append(_text(place(tick, every[0][1])[0], _HEIGHT - 6, f"{tick:g}", "middle"))
    for name, first in phases:
        if low_x <= first <= high_x:
            x = place(first, every[0][1])[0]
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" stroke="#999" '
                'stroke-dasharray="2 3"/>'
            )
            parts.append(_text(x + 3, _TOP - 4, name, "start", colour="#777"))
    for k, (label, points) in enumerate(lines.items()):
        colour = _COLOURS[k % len(_COLOURS)]
        places = [place(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.4"/>')
        if len(points) < 20:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{colour}"/>' for x, y in places]
        if len(lines) > 1:
            parts.append(_text(_WIDTH - _RIGHT - 70 * (len(lines) - 1 - k), 12, label, "end", colour=colour))
    return _svg(_WIDTH, _HEIGHT, parts)


def _ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """About so many round numbers in [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _text(x: float, y: float, text: str, anchor: str, bold: bool = False, colour: str = "#333") -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{weight}>{html.escape(text)}</text>'


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="11">{"".join(parts)}</svg>\n'
    )

"""A phase plan for people: a text table and a plot."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .noise_level import signal_to_noise, unshift_sigma

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .phases import PhasePlan


def describe_plan(plan: PhasePlan) -> str:
    """Write a plan as a text table: which expert runs which step, in sigma, raw time, SNR and log-SNR.

    Args:
        plan: The plan.

    Returns:
        One line for each step between a header and a summary.

    Examples:
        >>> from pdmd_core.phases import PhasePlan
        >>> print(describe_plan(PhasePlan.from_steps([2, 2], shift=5.0)))
        step      expert    sigma     next  raw time       SNR  log-SNR
           0  high_noise  1.00000  0.93750    1.0000         0     -inf
           1  high_noise  0.93750  0.83333    0.7500  0.004444   -5.416
           2   low_noise  0.83333  0.62500    0.5000      0.04   -3.219
           3   low_noise  0.62500  0.00000    0.2500      0.36   -1.022
        2 phase(s), 4 step(s); raw time at shift 5
    """
    shift = plan.shift
    rows = [("step", "expert", "sigma", "next", "raw time", "SNR", "log-SNR")]
    following = [*plan.sigmas[1:], 0.0]
    for step, (sigma, after) in enumerate(zip(plan.sigmas, following, strict=True)):
        snr = signal_to_noise(sigma)
        rows.append(
            (
                str(step),
                plan.phases[plan.phase_index(sigma)].name,
                f"{sigma:.5f}",
                f"{after:.5f}",
                f"{unshift_sigma(sigma, shift):.4f}" if shift is not None else "-",
                f"{snr:.4g}",
                f"{math.log(snr):+.3f}" if snr > 0 else "-inf",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rule = f"raw time at shift {shift:.4g}" if shift is not None else "no single shift makes these steps uniform"
    return "\n".join([*lines, f"{len(plan)} phase(s), {len(plan.sigmas)} step(s); {rule}"])


def plot_plan(plan: PhasePlan) -> Figure:
    """Draw a plan as a time line from noise (left) to data (right), with experts as bands and calls as dots.

    Args:
        plan: The plan.

    Returns:
        A figure of matplotlib, which must be installed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.2), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["viridis"]
    for k, phase in enumerate(plan.phases):
        end, start = plan.interval(k)
        axes.axvspan(end, start, color=colours(0.25 + 0.6 * k / len(plan)), alpha=0.35, lw=0)
        axes.text((end + start) / 2, 0.62, phase.name, ha="center", va="center", fontsize=9)
    axes.plot(plan.sigmas, [0.3] * len(plan.sigmas), "ko-", ms=5, lw=0.8)
    for sigma in plan.sigmas:
        axes.text(sigma, 0.1, f"{sigma:.4g}", ha="center", va="center", fontsize=8)
    axes.set(xlim=(1.02, -0.02), ylim=(0, 1), yticks=[], xlabel="sigma")
    snr = axes.secondary_xaxis("top")
    ticks = [0.95, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2, 0.1]
    snr.set_xticks(ticks, [f"{math.log(signal_to_noise(sigma)):+.1f}" for sigma in ticks], fontsize=8)
    snr.set_xlabel("log-SNR")
    return figure

"""What the pictures of all teachers share: every run by learning rate."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from benchmarks.claims.common.evidence import Row
from benchmarks.claims.common.methods import METHODS


def plot_by_lr(axes: Axes, rows: Sequence[Row], methods: Sequence[str], column: str, factor: float = 1.0) -> None:
    """A point for each row, a colour for each method, squares for ablations; the axis has no ticks but learning rates.

    Methods stand beside each other at a learning rate, not on top of each other.
    """
    for i, key in enumerate(methods):
        own = [row for row in rows if row.method == key]
        shift = 1.04 ** (i - len(methods) / 2)
        axes.plot(
            [(row.lr or 0.0) * shift for row in own],
            [float(row.value(column) or 0.0) * factor for row in own],
            "s" if METHODS[key].ablation_of else "o",
            ms=4,
            label=METHODS[key].title,
        )
    lrs = sorted({row.lr for row in rows if row.lr is not None})
    axes.set(xscale="log", xlabel="learning rate of the generator")
    axes.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
    axes.set_xticks([], minor=True)

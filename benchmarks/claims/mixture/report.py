"""Tables and pictures of the comparison on the mixture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.claims.common.evidence import Row, Spread, best_lr, best_rows, markdown_table, spread, update_json
from benchmarks.claims.common.figures import plot_by_lr
from benchmarks.claims.common.methods import METHODS, Run
from benchmarks.claims.mixture.mixture import kernel_distance_to_exact, variance_in_modes
from benchmarks.claims.mixture.study import REFERENCES, MixtureStudy

HEADER = (
    "method",
    "evaluations",
    "learning rate",
    "kernel distance x 10^4",
    "at the first boundary x 10^4",
    "error of mode weights, %",
    "off the modes, %",
    "variance in modes, % of exact",
    "coverage, %",
    "Frechet distance x 10^4",
    "diversity, % of exact",
    "evaluations per update",
)
_SHOWN = 3000
"""Samples in a picture."""


class MixtureReport:
    """What was measured of one study, at one number of updates and, where there are any, at more."""

    def __init__(self, study: MixtureStudy, rows: Sequence[Row], updates: int) -> None:
        self.study, self.rows, self.updates = study, rows, updates
        self.methods = [key for key in METHODS if best_lr(rows, key, updates) is not None]
        self.longer = sorted({row.updates for row in rows if row.updates > updates})
        self.exact = {}
        for column in ("diversity", "variance_in_modes"):
            found = spread(self.of("exact"), column)
            if found is None:
                raise ValueError("a report needs the rows of exact samples")
            self.exact[column] = found.mean

    def of(self, reference: str) -> list[Row]:
        """Rows of what needs no training."""
        return [row for row in self.rows if row.method == reference]

    def write(self, folder: Path) -> None:
        """Add to paper_claims.json, write mixture.md and its pictures."""
        chosen = [row for name in REFERENCES for row in self.of(name)]
        for updates in (self.updates, *self.longer):
            chosen += [row for key in METHODS for row in best_rows(self.rows, key, updates)]
        settings = {**self.study.describe(), "updates": self.updates}
        update_json(folder / "paper_claims.json", self.study.teacher, chosen, self.rows, settings)
        (folder / "mixture.md").write_text(self.markdown(), encoding="utf-8")
        self.picture_of_samples().savefig(folder / "mixture_samples.png", dpi=110)
        self.picture_of_scores().savefig(folder / "mixture_scores.png", dpi=110)

    def markdown(self) -> str:
        """Tables with mean ± sample standard deviation over seeds."""
        lines = [self._line(title, self.of(name)) for name, title in REFERENCES.items()]
        lines += [self._line(METHODS[key].title, best_rows(self.rows, key, self.updates)) for key in self.methods]
        seeds = max(len(best_rows(self.rows, key, self.updates)) for key in self.methods)
        parts = [
            "# The mixture",
            "",
            f"{self.updates} generator updates over all phases, {seeds} seeds, each method at the best of "
            f"{', '.join(f'{lr:g}' for lr in self._lrs())}; mean ± standard deviation over seeds.",
            "",
            markdown_table(HEADER, lines),
            "",
            "![samples of each method from the same noise](mixture_samples.png)",
            "",
            "## Every learning rate",
            "",
            "Kernel distance x 10^4.",
            "",
            markdown_table(("method", *(f"{lr:g}" for lr in self._lrs())), [self._grid(key) for key in self.methods]),
            "",
            "![kernel distance of every run by learning rate](mixture_scores.png)",
            "",
        ]
        parts += self._truncation()
        if self.longer:
            columns = (self.updates, *self.longer)
            table = [self._budgets(key, columns) for key in self.methods if best_lr(self.rows, key, self.longer[0])]
            parts += [
                "## Trained for longer",
                "",
                "Kernel distance x 10^4 by generator updates, at the better of two learning rates: the best of the "
                "first column and the next lower one.",
                "",
                markdown_table(("method", *map(str, columns)), table),
                "",
            ]
        return "\n".join(parts + self._phase_by_phase())

    def _phase_by_phase(self) -> list[str]:
        """The way to the samples of the methods with phases, at every number of updates."""
        lines, ends = [], set[float]()
        for key in self.methods:
            if METHODS[key].ablation_of or len(METHODS[key].steps) == 1:
                continue
            for updates in (self.updates, *self.longer):
                cells = self._phase_ends(best_rows(self.rows, key, updates))
                if cells:
                    lines.append((METHODS[key].title, str(updates), cells))
                    ends |= set(cells)
        if not lines:
            return []
        columns = sorted(ends, reverse=True)
        return [
            "## Phase by phase",
            "",
            "Kernel distance x 10^4 to the mixture noised to sigma, of samples at the end of each phase; in brackets "
            "of the phase's expert alone, from exact samples at the phase's start.",
            "",
            markdown_table(
                ("method", "updates", *(f"sigma {sigma:g}" for sigma in columns)),
                [[title, updates, *(cells.get(sigma, "") for sigma in columns)] for title, updates, cells in lines],
            ),
            "",
        ]

    def _phase_ends(self, rows: Sequence[Row]) -> dict[float, str]:
        """Distances at the end of each phase, by sigma."""
        by_seed = [
            self.study.phase_ends(Run(METHODS[row.method], row.lr or 0.0, row.seed, row.updates), row.seed)
            for row in rows
        ]
        cells = {}
        for found in zip(*by_seed, strict=True):
            truth = self.study.mixture.marginal(found[0].sigma)
            chained, alone = (
                Spread.of([kernel_distance_to_exact(x, truth) for x in samples]).text(1e4, 1)
                for samples in ([end.chained for end in found], [end.alone for end in found])
            )
            cells[found[0].sigma] = f"{chained} ({alone})"
        return cells

    def _truncation(self) -> list[str]:
        """What SGTS trains, step by step, of the methods that truncate."""
        lines, most = [], 0
        for key in self.methods:
            method = METHODS[key]
            if method.ablation_of or method.steps[-1] == 1:
                continue
            runs = [
                Run(method, row.lr or 0.0, row.seed, row.updates) for row in best_rows(self.rows, key, self.updates)
            ]
            by_seed = [self.study.truncated(run, run.seed) for run in runs]
            steps = [self._narrowness([found[i] for found in by_seed]) for i in range(method.steps[-1])]
            together = [torch.cat([x[i :: len(found)] for i, x in enumerate(found)]) for found in by_seed]
            lines.append([method.title, self._narrowness(together), *steps])
            most = max(most, len(steps))
        if not lines:
            return []
        header = ("method", "all together", *(f"from step {i + 1}" for i in range(most)))
        return [
            "## What truncation matches",
            "",
            "Variance in modes in % of exact (kernel distance x 10^4) of rollouts that jump to the end from one step "
            "of the last phase, as SGTS trains them; from the last step it is the whole rollout, as in sampling. All "
            "together, in equal parts, are what the fake learns.",
            "",
            markdown_table(header, [line + [""] * (most + 2 - len(line)) for line in lines]),
            "",
        ]

    def _narrowness(self, samples: Sequence[Tensor]) -> str:
        mixture = self.study.mixture
        variance = Spread.of([variance_in_modes(x, mixture) / self.exact["variance_in_modes"] for x in samples])
        distance = Spread.of([kernel_distance_to_exact(x, mixture) for x in samples])
        return f"{variance.text(100, 0)} ({distance.text(1e4, 1)})"

    def _lrs(self) -> list[float]:
        return sorted({row.lr for row in self.rows if row.lr is not None})

    def _line(self, title: str, rows: Sequence[Row]) -> list[str]:
        def cell(column: str, scale: float, digits: int = 2) -> str:
            found = spread(rows, column)
            return "" if found is None else found.text(scale, digits)

        lr = rows[0].lr
        trained = rows[0].extra.get("training_evaluations")
        return [
            title,
            str(rows[0].network_evaluations or ""),
            "" if lr is None else f"{lr:g}",
            cell("score", 1e4),
            cell("boundary_kernel_distance", 1e4),
            cell("mode_weight_error", 100),
            cell("off_modes", 100),
            cell("variance_in_modes", 100 / self.exact["variance_in_modes"], 1),
            cell("coverage", 100, 1),
            cell("frechet", 1e4, 1),
            cell("diversity", 100 / self.exact["diversity"], 1),
            "" if trained is None else f"{trained / rows[0].updates:.1f}",
        ]

    def _grid(self, key: str) -> list[str]:
        cells = []
        for lr in self._lrs():
            scores = [row.score for row in self.rows if (row.method, row.updates, row.lr) == (key, self.updates, lr)]
            cells.append(Spread.of(scores).text(1e4) if scores else "")
        return [METHODS[key].title, *cells]

    def _budgets(self, key: str, columns: Sequence[int]) -> list[str]:
        found = [spread(best_rows(self.rows, key, updates), "score") for updates in columns]
        return [METHODS[key].title, *("" if f is None else f.text(1e4) for f in found)]

    # --- pictures ------------------------------------------------------------

    def picture_of_samples(self) -> Figure:
        """A panel for each method, all from the same noise; the exact samples first."""
        panels: list[tuple[str, Tensor]] = [
            (title, self.study.reference(name, 0, _SHOWN)) for name, title in REFERENCES.items() if self.of(name)
        ]
        for key in self.methods:
            row = best_rows(self.rows, key, self.updates)[0]
            run = Run(METHODS[key], row.lr or 0.0, row.seed, self.updates)
            panels.append((METHODS[key].title, self.study.walk(run, 0, _SHOWN).samples))
        columns = 5
        count = -(-len(panels) // columns)
        figure = Figure(figsize=(3 * columns, 3.2 * count), layout="constrained")
        axes = figure.subplots(count, columns, squeeze=False).flatten()
        for place in axes:
            place.set_axis_off()
        for place, (title, samples) in zip(axes, panels, strict=False):
            place.set_axis_on()
            place.scatter(*samples.T.numpy(), s=1, alpha=0.4, lw=0, rasterized=True)
            place.plot(*self.study.mixture.centres.T.numpy(), "k+", ms=6, mew=0.8)
            place.set(title=title, xlim=(-2.1, 2.1), ylim=(-2.1, 2.1), aspect="equal", xticks=[], yticks=[])
            place.title.set_size(9)
        return figure

    def picture_of_scores(self) -> Figure:
        """Kernel distance of every run by learning rate, a colour for each method; the floor as a band."""
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.subplots()
        equal = [row for row in self.rows if row.updates == self.updates]
        plot_by_lr(axes, equal, self.methods, "score")
        floor = max(abs(row.score) for row in self.of("exact"))
        axes.axhspan(1e-5, max(floor, 1.1e-5), color="0.85", label="noise floor")
        for row in self.of("teacher_4")[:1]:
            axes.axhline(row.score, color="0.5", lw=1, ls="--", label=REFERENCES["teacher_4"])
        axes.set(yscale="log", ylabel="kernel distance")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure

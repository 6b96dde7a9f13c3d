"""Tables and pictures of the comparison on an embedded teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.claims.common.evidence import Row, Spread, best_lr, best_rows, markdown_table, spread, update_json
from benchmarks.claims.common.figures import plot_by_lr
from benchmarks.claims.common.methods import METHODS, Run
from benchmarks.claims.embedded.gallery import Gallery
from benchmarks.claims.embedded.study import EmbeddedStudy


class EmbeddedReport:
    """What was measured of one study, at one number of updates and, where there are any, at more."""

    def __init__(self, study: EmbeddedStudy, rows: Sequence[Row], updates: int) -> None:
        self.study, self.rows, self.updates = study, rows, updates
        self.gallery = Gallery(study)
        self.clips = self.gallery.clips
        self.distance = "FD-Emoji+flow" if self.clips else "FD-Emoji"
        self.methods = [key for key in METHODS if best_lr(rows, key, updates, study.grid_seeds) is not None]
        self.longer = sorted({row.updates for row in rows if row.updates > updates})
        self.teacher = self.of(next(iter(study.references)))
        if not self.teacher:
            raise ValueError("a report needs the rows of the many-step teacher")

    def of(self, reference: str) -> list[Row]:
        """Rows of what needs no training."""
        return [row for row in self.rows if row.method == reference]

    def best(self, key: str, updates: int | None = None) -> list[Row]:
        """Rows of a method at its best learning rate."""
        return best_rows(self.rows, key, updates or self.updates, self.study.grid_seeds)

    def write(self, folder: Path) -> None:
        """Add to paper_claims.json, write the Markdown file of this teacher and its pictures."""
        chosen = [row for name in self.study.references for row in self.of(name)]
        for updates in (self.updates, *self.longer):
            chosen += [row for key in METHODS for row in self.best(key, updates)]
        settings = {**self.study.describe(), "updates": self.updates}
        name = self.study.teacher
        update_json(folder / "paper_claims.json", name, chosen, self.rows, settings)
        (folder / f"{name}.md").write_text(self.markdown(), encoding="utf-8")
        self.picture_of_runs().savefig(folder / f"{name}_runs.png", dpi=110)
        for part, methods in self._parts().items():
            self.gallery.write(folder, part, [(title, self._shown(key, rows[0])) for title, key, rows in methods])

    # --- tables ------------------------------------------------------------

    def columns(self) -> list[tuple[str, str, float, int]]:
        """(title, column, factor, digits) of what was measured."""
        diversity, flow = (self._of_teacher("diversity"), self._of_teacher("motion"))
        columns = [
            (self.distance, "frechet", 1.0, 1 if self.clips else 3),
            ("kernel distance x 10^3", "kernel_distance", 1e3, 1),
            ("FD of layout", "frechet_layout", 1.0, 1),
            ("diversity, % of teacher", "diversity", diversity, 1),
            ("spread of place, px", "place_spread", 1.0, 2),
            ("coverage, %", "coverage", 100, 1),
            ("recall, %", "recall", 100, 1),
            ("agreement, %", "agreement", 100, 1),
            (f"{self.distance} to data", "frechet_data", 1.0, 1 if self.clips else 3),
        ]
        if self.clips:
            columns[1:1] = [("FD-Emoji of frames", "frechet_frames", 1.0, 3)]
            columns += [
                ("flow, px/frame", "motion", 1.0, 3),
                ("flow, % of teacher", "motion", flow, 1),
                ("dynamic degree, %", "dynamic_degree", 100, 1),
                ("smoothness, %", "smoothness", 100, 2),
                ("moves as said, %", "moves_as_said", 100, 1),
            ]
        return columns

    def _of_teacher(self, column: str) -> float:
        """Factor that makes a column per cent of the many-step teacher's mean."""
        found = spread(self.teacher, column)
        return 100 / found.mean if found is not None and found.mean else 1.0

    def markdown(self) -> str:
        """Tables with mean ± sample standard deviation over seeds."""
        name, study = self.study.teacher, self.study
        lines = [self._line(title, self.of(key)) for key, title in study.references.items()]
        lines += [self._line(METHODS[key].title, self.best(key)) for key in self.methods]
        header = ("method", "evaluations", "learning rate", "seeds", *(title for title, *_ in self.columns()))
        scenes, seeds = len(study.measuring.scenes), study.measuring.seeds
        parts = [
            f"# The embedded teacher, {name}",
            "",
            f"{self.updates} generator updates over all phases in batches of {study.settings.recipe.batch_size}. Every "
            f"row of one seed is {scenes * seeds} samples, {seeds} of each of {scenes} prompts; mean ± standard "
            f"deviation over seeds. Learning rates {', '.join(f'{lr:g}' for lr in self._lrs())} were run with "
            f"{study.grid_seeds} seed, and that with the lowest {self.distance} of each method with all.",
            "",
            markdown_table((*header, "evaluations per update"), lines),
            "",
            f"The row of the teacher in {study.measuring.teacher_steps} steps, other samples than those of the "
            "reference, is the noise floor. Intervals of every row are in [paper_claims.json](paper_claims.json).",
            "",
        ]
        for part, methods in self._parts().items():
            parts += self.gallery.markdown(part, [title for title, _, _ in methods])
        parts += [
            "## Every learning rate",
            "",
            f"{self.distance} (diversity in % of the teacher's), seed 0.",
            "",
            markdown_table(("method", *(f"{lr:g}" for lr in self._lrs())), [self._grid(key) for key in self.methods]),
            "",
            f"![every run by learning rate]({name}_runs.png)",
            "",
        ]
        if self.longer:
            columns = (self.updates, *self.longer)
            parts += [
                "## Trained for longer",
                "",
                f"{self.distance} (diversity in % of the teacher's) by generator updates, at the better of two "
                "learning rates: the best of the first column and the next lower one.",
                "",
                markdown_table(("method", *map(str, columns)), self._budgets(columns)),
                "",
            ]
        return "\n".join(parts)

    def _lrs(self) -> list[float]:
        return sorted({row.lr for row in self.rows if row.lr is not None})

    def _line(self, title: str, rows: Sequence[Row]) -> list[str]:
        cells = []
        for _, column, factor, digits in self.columns():
            found = spread(rows, column)
            cells.append("" if found is None else found.text(factor, digits))
        lr, trained = rows[0].lr, rows[0].extra.get("training_evaluations")
        per_update = "" if trained is None else f"{trained / rows[0].updates:.1f}"
        evaluations = str(rows[0].network_evaluations or "")
        return [title, evaluations, "" if lr is None else f"{lr:g}", str(len(rows)), *cells, per_update]

    def _grid(self, key: str) -> list[str]:
        cells = []
        decide = self.study.grid_seeds
        for lr in self._lrs():
            own = [row for row in self.rows if (row.method, row.updates, row.lr) == (key, self.updates, lr)]
            cells.append(self._short([row for row in own if row.seed < decide]))
        return [METHODS[key].title, *cells]

    def _budgets(self, columns: Sequence[int]) -> list[list[str]]:
        return [
            [METHODS[key].title, *(self._short(self.best(key, updates)) for updates in columns)]
            for key in self.methods
            if self.best(key, self.longer[0])
        ]

    def _short(self, rows: Sequence[Row]) -> str:
        if not rows:
            return ""
        frechet, diversity = (Spread.of([float(row.value(c) or 0.0) for row in rows]) for c in ("frechet", "diversity"))
        share = diversity.text(self._of_teacher("diversity"), 1)
        return f"{frechet.text(digits=1 if self.clips else 3)} ({share})"

    # --- pictures ------------------------------------------------------------

    def picture_of_runs(self) -> Figure:
        """Every run by learning rate, a colour for each method, one panel for each measure; the teacher as lines."""
        panels = [
            ("frechet", self.distance, 1.0),
            ("diversity", "diversity, % of teacher", self._of_teacher("diversity")),
        ]
        if self.clips:
            panels.append(("motion", "flow, % of teacher", self._of_teacher("motion")))
        figure = Figure(figsize=(9, 3.6 * len(panels)), layout="constrained")
        for place, (column, title, factor) in zip(
            figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True
        ):
            self._panel(place, column, factor)
            place.set(ylabel=title)
            if column == "frechet":
                place.set_yscale("log")
                place.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure

    def _panel(self, place: Axes, column: str, factor: float) -> None:
        equal = [row for row in self.rows if row.updates == self.updates]
        plot_by_lr(place, equal, self.methods, column, factor)
        for style, (name, title) in zip(("-", "--"), self.study.references.items(), strict=False):
            found = spread(self.of(name), column)
            if found is not None:
                place.axhline(found.mean * factor, color="0.5", lw=1, ls=style, label=title)

    def _parts(self) -> dict[str, list[tuple[str, str, list[Row]]]]:
        """(title, key, rows) of what is shown together: the methods, and the ablations of one of them with it."""
        teachers = [(t, key, self.of(key)) for key, t in self.study.references.items() if key.startswith("teacher_")]
        own = [(METHODS[key].title, key, self.best(key)) for key in self.methods]
        ablations = [entry for entry in own if METHODS[entry[1]].ablation_of]
        parts = {"methods": teachers + [entry for entry in own if entry not in ablations]}
        if ablations:
            base = [entry for entry in own if entry[1] == "phased_2x2"]
            parts["ablations"] = teachers[:1] + base + ablations
        return parts

    def _shown(self, key: str, row: Row) -> Run | int:
        if row.lr is None:
            return int(key.removeprefix("teacher_"))
        return Run(METHODS[key], row.lr, row.seed, self.updates)

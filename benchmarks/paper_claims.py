"""The paper's claims, measured: ``python benchmarks/paper_claims.py``.

Trains and measures every method from the same teacher, with the same number of generator updates, over a grid of
learning rates and several seeds, and writes docs/evidence/: paper_claims.json, tables, pictures, a verdict on each
claim. Everything that was trained or measured is kept in --work_dir: a run that was cut off goes on where it was,
stages and teachers can be run one by one, several processes can work on different methods. The mixture takes about an
hour on one core, pictures and clips half a day each. Definitions are in docs/evidence/README.md.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm.auto import tqdm

from benchmarks.claims.common.evidence import Row, best_lr, best_rows
from benchmarks.claims.common.methods import METHODS, Run, runs
from benchmarks.claims.common.summary import write_summary
from benchmarks.claims.common.verdict import write_verdict
from benchmarks.claims.embedded.report import EmbeddedReport
from benchmarks.claims.embedded.study import SETTINGS, EmbeddedStudy
from benchmarks.claims.mixture.report import MixtureReport
from benchmarks.claims.mixture.study import MixtureStudy
from pdmd_core.arguments import COUNT, number

Study = MixtureStudy | EmbeddedStudy
ROOT = Path(__file__).resolve().parents[1]
TEACHERS = ("mixture", "pictures", "clips")
STAGES = {
    "prepare": "what all runs of a teacher need, and rows of the teacher itself",
    "equal": "every method at every learning rate, for the same number of updates",
    "long": "the four methods for twice the updates, four times, ... until that stops helping",
    "report": "tables, pictures and the verdict, of all runs that are there",
}
STILL_IMPROVES = 0.95
"""Twice the updates help if they bring the mean score below this share of what it was."""


class Claims:
    """The stages on one teacher."""

    def __init__(self, study: Study, options: argparse.Namespace) -> None:
        self.study, self.options = study, options
        self.lrs: tuple[float, ...] = tuple(options.lrs or study.lrs)
        self.updates: int = options.updates or study.updates
        self.seeds = range(options.seeds)

    # --- which runs ------------------------------------------------------------

    def grid(self, methods: Sequence[str]) -> list[Run]:
        """Every learning rate, with the seeds that decide on the best."""
        return runs(methods, self.lrs, self.seeds[: self.study.grid_seeds], self.updates)

    def other_seeds(self, key: str, rows: Sequence[Row], updates: int) -> list[Run]:
        """The best learning rate with the seeds that the grid was not run with."""
        lr = self.best_lr(key, rows, updates)
        others = self.seeds[len(self.seeds[: self.study.grid_seeds]) :]
        return [] if lr is None else runs([key], [lr], others, updates)

    def longer(self, key: str, lr: float, times: int) -> list[Run]:
        """For so many times the updates, with the seeds that decide: at this learning rate and the next lower one."""
        lrs = [lr, *sorted(other for other in self.lrs if other < lr)[-1:]]
        return runs([key], lrs, self.seeds[: self.study.grid_seeds], times * self.updates)

    def best_lr(self, key: str, rows: Sequence[Row], updates: int) -> float | None:
        """Of this method for this number of updates; None when it was not trained."""
        return best_lr(rows, key, updates, self.study.grid_seeds)

    # --- what is there ------------------------------------------------------------

    def references(self) -> list[Row]:
        """Rows of what needs no training."""
        return [self.study.reference_row(name, seed) for name in self.study.references for seed in self.seeds]

    def trained(self) -> list[Row]:
        """Rows of all runs that are there; trains nothing."""
        rows = self._there(self.grid(self.options.methods))
        for key in self.options.methods:
            rows += self._there(self.other_seeds(key, rows, self.updates))
            lr = self.best_lr(key, rows, self.updates)
            if lr is None:
                continue
            for times in self.study.longer:
                rows += self._there(self.longer(key, lr, times))
                rows += self._there(self.other_seeds(key, rows, times * self.updates))
        return rows

    def _there(self, wanted: Sequence[Run]) -> list[Row]:
        return [self.study.row(run) for run in wanted if self.study.has_row(run)]

    # --- stages ------------------------------------------------------------

    def prepare(self) -> None:
        """See STAGES."""
        self.study.prepare()
        self.references()

    def equal(self) -> None:
        """See STAGES. The four methods first, then the ablations."""
        for ablations in (False, True):
            methods = [key for key in self.options.methods if bool(METHODS[key].ablation_of) == ablations]
            rows = self._rows_of(self.grid(methods), "grid")
            for key in methods:
                self._rows_of(self.other_seeds(key, rows, self.updates), key)

    def long(self) -> None:
        """See STAGES."""
        trained = self.trained()
        for key in self.options.methods:
            lr = self.best_lr(key, trained, self.updates)
            if METHODS[key].ablation_of or lr is None:
                continue
            score = self._score(key, trained, self.updates)
            for times in self.study.longer:
                updates, name = times * self.updates, f"{key}, {times * self.updates} updates"
                rows = self._rows_of(self.longer(key, lr, times), name)
                rows += self._rows_of(self.other_seeds(key, rows, updates), name)
                before, score = score, self._score(key, rows, updates)
                if score > STILL_IMPROVES * before:
                    break

    def _score(self, key: str, rows: Sequence[Row], updates: int) -> float:
        """Mean of a method at its best learning rate."""
        return statistics.mean(row.score for row in best_rows(rows, key, updates, self.study.grid_seeds))

    def _rows_of(self, wanted: Sequence[Run], name: str) -> list[Row]:
        rows = []
        for run in (bar := tqdm(wanted, desc=f"{self.study.teacher}, {name}", unit="run")):
            bar.set_postfix_str(run.name)
            rows.append(self.study.row(run))
        return rows

    def report(self) -> None:
        """See STAGES."""
        trained = self.trained()
        if not any(row.updates == self.updates for row in trained):
            raise SystemExit("nothing to report: no run of these options is there, run the stage 'equal' first")
        folder: Path = self.options.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        rows = [*self.references(), *trained]
        report = make_report(self.study, rows, self.updates)
        report.write(folder)
        write_summary(folder)
        write_verdict(folder)
        print(report.markdown())


def make_study(teacher: str, options: argparse.Namespace) -> Study:
    """The study of one of TEACHERS."""
    if teacher == "mixture":
        return MixtureStudy(options.work_dir)
    settings = SETTINGS[teacher]
    if options.guidance_scale is not None:
        settings = replace(settings, guidance_scale=options.guidance_scale)
    return EmbeddedStudy(options.work_dir, teacher, settings)


def make_report(study: Study, rows: Sequence[Row], updates: int) -> MixtureReport | EmbeddedReport:
    """The report of a study."""
    if isinstance(study, MixtureStudy):
        return MixtureReport(study, rows, updates)
    return EmbeddedReport(study, rows, updates)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    stages = "\n".join(f"  {name:8} {text}" for name, text in STAGES.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nStages:\n{stages}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=COUNT, default=3)
    parser.add_argument("--lrs", nargs="+", type=float, help="the grid of learning rates (the teacher's own)")
    parser.add_argument("--updates", type=COUNT, help="generator updates over all phases (the teacher's own)")
    parser.add_argument("--guidance_scale", type=number(1), help="of the teacher of pictures and clips (its own)")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs" / "paper_claims")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs" / "evidence")
    options = parser.parse_args(arguments)
    if options.updates is not None and options.updates % 4:
        parser.error(f"--updates is a multiple of 4, as phases share them equally, found {options.updates}")
    if options.lrs is not None and not all(0 < lr < math.inf for lr in options.lrs):
        parser.error(f"--lrs are learning rates above 0, found {' '.join(f'{lr:g}' for lr in options.lrs)}")
    if options.guidance_scale is not None and "mixture" in options.teacher:
        parser.error("--guidance_scale is of pictures and clips, the mixture has none: name them in --teacher")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages that were asked for, in their order, teacher by teacher."""
    options = parse(arguments)
    torch.set_num_threads(1)  # the networks are small: more threads only wait for each other
    for teacher in options.teacher:
        claims = Claims(make_study(teacher, options), options)
        for stage in STAGES:
            if stage in options.stages:
                print(f"{teacher}, stage {stage}: {STAGES[stage]}", flush=True)
                getattr(claims, stage)()


if __name__ == "__main__":
    main()

"""The paper's claims, measured: ``python benchmarks/paper_claims.py``.

Trains and measures every method from the same teacher, with the same number of generator updates, over a grid of
learning rates and several seeds, and writes docs/evidence/: paper_claims.json, tables, pictures. Everything that was
trained or measured is kept in --work_dir: a run that was cut off goes on where it was, and stages can be run one by
one. Definitions are in docs/evidence/README.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm.auto import tqdm

from benchmarks.claims.evidence import Row, best_lr, best_rows
from benchmarks.claims.methods import METHODS, Run
from benchmarks.claims.mixture_report import MixtureReport
from benchmarks.claims.mixture_study import REFERENCES, MixtureStudy, runs

ROOT = Path(__file__).resolve().parents[1]
STAGES = {
    "prepare": "the network that all roles start from, and rows of exact samples and of the teacher",
    "equal": "every method at every learning rate with every seed, for the same number of updates",
    "long": "the four methods at their best learning rate for more and more updates, until that stops helping",
    "report": "tables and pictures of all runs that are there",
}
LONGER = (2, 4, 8)
"""Times the equal number of updates, in the stage "long"."""
STILL_IMPROVES = 0.9
"""Twice the updates help if they bring the mean score below this share of what it was."""


class Claims:
    """The stages on one teacher."""

    def __init__(self, study: MixtureStudy, options: argparse.Namespace) -> None:
        self.study, self.options = study, options

    def prepare(self) -> None:
        """See STAGES."""
        _ = self.study.initial
        self.references()

    def references(self) -> list[Row]:
        """Rows of what needs no training."""
        return [self.study.reference_row(name, seed) for name in REFERENCES for seed in range(self.options.seeds)]

    def equal_runs(self) -> list[Run]:
        """The grid."""
        options = self.options
        return runs(options.methods, options.lrs, options.seeds, options.updates)

    def equal(self) -> None:
        """See STAGES."""
        for run in (bar := tqdm(self.equal_runs(), unit="run")):
            bar.set_description(run.name)
            self.study.row(run)

    def long(self) -> None:
        """See STAGES."""
        rows = self.rows()
        for key in self.options.methods:
            lr = best_lr(rows, key, self.options.updates)
            if METHODS[key].ablation_of or lr is None:
                continue
            scores = [row.score for row in best_rows(rows, key, self.options.updates)]
            for wanted in self.longer_runs(key, lr):
                before = statistics.mean(scores)
                bar = tqdm(wanted, desc=f"{key}, {wanted[0].updates} updates", unit="run")
                scores = [self.study.row(run).score for run in bar]
                if statistics.mean(scores) > STILL_IMPROVES * before:
                    break

    def longer_runs(self, key: str, lr: float) -> list[list[Run]]:
        """All seeds for twice the updates, four times the updates, ..."""
        options = self.options
        return [runs([key], [lr], options.seeds, times * options.updates) for times in LONGER]

    def rows(self) -> list[Row]:
        """Every row that is there for these options; trains nothing."""
        rows = [*self.references(), *self._there(self.equal_runs())]
        for key in self.options.methods:
            lr = best_lr(rows, key, self.options.updates)
            if lr is not None:
                rows += self._there([run for wanted in self.longer_runs(key, lr) for run in wanted])
        return rows

    def _there(self, wanted: Sequence[Run]) -> list[Row]:
        return [self.study.row(run) for run in wanted if self.study.has_row(run)]

    def report(self) -> None:
        """See STAGES."""
        rows = self.rows()
        if not any(best_rows(rows, key, self.options.updates) for key in self.options.methods):
            raise SystemExit("nothing to report: no run of these options is there, run the stage 'equal' first")
        self.options.output_dir.mkdir(parents=True, exist_ok=True)
        report = MixtureReport(self.study, rows, self.options.updates)
        report.write(self.options.output_dir)
        print(report.markdown())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    stages = "\n".join(f"  {name:8} {text}" for name, text in STAGES.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nStages:\n{stages}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", choices=["mixture"], default="mixture")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--updates", type=int, default=1200, help="generator updates over all phases")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs" / "paper_claims")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs" / "evidence")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.updates < 4 or options.updates % 4:
        parser.error("--seeds is at least 1 and --updates a multiple of 4: phases share them equally")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages that were asked for, in their order."""
    options = parse(arguments)
    torch.set_num_threads(1)  # the networks are small: more threads only wait for each other
    claims = Claims(MixtureStudy(options.work_dir), options)
    for stage in STAGES:
        if stage in options.stages:
            print(f"stage {stage}: {STAGES[stage]}", flush=True)
            getattr(claims, stage)()


if __name__ == "__main__":
    main()

"""Variants of the method at equal network evaluations: ``python benchmarks/leaderboard.py``.

Every variant is trained on every mixture at a grid of learning rates with seeds that only decide on the rate, and then
at the best one with five others, which are reported. What was trained is kept in --work_dir; a run that was cut off
goes on where it was. The report is written of what is there. Definitions are in docs/evidence/README.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.claims.common.evidence import Row, Spread, markdown_table, spread
from benchmarks.claims.common.variants import VARIANTS
from benchmarks.claims.mixture.board import BASELINE, LRS, REFINED, UPDATES, Board
from benchmarks.claims.mixture.kinds import KINDS

ROOT = Path(__file__).resolve().parents[1]
HEADER = (
    "variant",
    "steps",
    "kernel distance x 10^4",
    *(f"refined to {steps}" for steps in REFINED),
    "error of mode weights, %",
    "off the modes, %",
    "variance in modes",
    "distance to the teacher's sample",
    "learning rate",
    "updates",
    "evaluations of an update",
    "seeds",
)


def line_of(key: str, rows: Sequence[Row]) -> list[str]:
    """A variant on a mixture."""

    def cell(column: str, scale: float = 1.0, digits: int = 2) -> str:
        there = [row for row in rows if column in row.extra or column == "score"]
        found: Spread | None = spread(there, column)
        return "" if found is None else found.text(scale, digits)

    first = rows[0]
    forward, backward = (first.extra.get(name) for name in ("forward", "backward"))
    return [
        VARIANTS[key].title if key in VARIANTS else key,
        str(first.network_evaluations or ""),
        cell("score", 1e4, 1),
        *(cell(f"refined_{steps}", 1e4, 1) for steps in REFINED),
        cell("mode_weight_error", 100),
        cell("off_modes", 100),
        cell("variance_in_modes"),
        cell("same_noise", 1, 3),
        f"{first.lr:g}" if first.lr else "",
        str(first.updates or ""),
        "" if forward is None or backward is None else f"{forward:g} + {backward:g}",
        str(len(rows)),
    ]


def report(boards: Sequence[Board]) -> str:
    """The page of all mixtures of which there are rows; best first."""
    parts = [
        "# Leaderboard",
        "",
        f"Variants at equal network evaluations, those of {UPDATES} updates of {VARIANTS[BASELINE].title} (a backward "
        "pass counts as two forward ones). The learning rate, of "
        f"{', '.join(f'{lr:g}' for lr in LRS)}, is the best on two seeds that are not reported, and the next on both sides "
        "were tried; mean ± standard deviation over the others. Written by `python benchmarks/leaderboard.py --stages report`.",
        "",
    ]
    for board in boards:
        found = {key: board.reported(method) for key, method in VARIANTS.items()}
        there = {key: rows for key, rows in found.items() if rows}
        if not there:
            continue
        ranked = sorted(there, key=lambda key: sum(row.score for row in there[key]) / len(there[key]))
        lines = [line_of("exact samples", [board.exact(seed) for seed in range(3)])]
        lines += [line_of(key, there[key]) for key in ranked]
        parts += [f"## {KINDS[board.kind].title}", "", markdown_table(HEADER, lines), ""]
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtures", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--stages", nargs="+", choices=("train", "report"), default=["train", "report"])
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs" / "leaderboard")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "evidence" / "leaderboard.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    boards = [Board(options.work_dir, kind) for kind in options.mixtures]
    if "train" in options.stages:
        for board in boards:
            for row in board.work([VARIANTS[key] for key in options.variants]):
                print(f"{board.kind} {row.method} lr {row.lr:g} seed {row.seed}: {row.score * 1e4:.1f}", flush=True)
    if "report" in options.stages:
        options.output.write_text(report(boards), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Variants of the method at equal network evaluations: ``python benchmarks/leaderboard.py``.

Every variant is trained on every teacher (seven mixtures, pictures, clips) at a grid of learning rates with seeds that
only decide on the rate, and then at the best one with five others, which are reported. What was trained is kept in
--work_dir; a run that was cut off goes on where it was. The report is written of what is there. Definitions are in
docs/evidence/README.md.
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

from benchmarks.claims.common.board import REPORTED, Board
from benchmarks.claims.common.evidence import Row, Spread, markdown_table, spread
from benchmarks.claims.common.variants import BASELINE, VARIANTS
from benchmarks.claims.embedded.board import EmbeddedBoard
from benchmarks.claims.mixture.board import MixtureBoard
from benchmarks.claims.mixture.kinds import KINDS

ROOT = Path(__file__).resolve().parents[1]
TEACHERS = [*KINDS, "pictures", "clips"]
Column = tuple[str, str, float, int]
ON_MIXTURES: tuple[Column, ...] = (
    ("kernel distance x 10^4", "score", 1e4, 1),
    *((f"refined to {steps}", f"refined_{steps}", 1e4, 1) for steps in (8, 16)),
    ("error of mode weights, %", "mode_weight_error", 100, 2),
    ("off the modes, %", "off_modes", 100, 2),
    ("variance in modes", "variance_in_modes", 1, 2),
    ("distance to the teacher's sample", "same_noise", 1, 3),
)
ON_SAMPLES: tuple[Column, ...] = (
    ("Frechet distance", "score", 1, 4),
    ("diversity", "diversity", 1, 4),
    ("optical flow", "motion", 1, 3),
)
"""Title, column, scale, digits."""


def line_of(board: Board, columns: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """A variant, or a reference, on a teacher."""

    def cell(column: str, scale: float, digits: int) -> str:
        if any(column not in {**row.to_dict()} for row in rows):
            return ""
        found: Spread | None = spread(rows, column)
        return "" if found is None else found.text(scale, digits)

    first = rows[0]
    method = VARIANTS.get(first.method)
    forward, backward = board.cost(method) if method else (None, None)
    return [
        method.title if method else first.method,
        str(first.network_evaluations or ""),
        *(cell(column, scale, digits) for _, column, scale, digits in columns),
        f"{first.lr:g}" if first.lr else "",
        str(first.updates or ""),
        "" if method is None else f"{forward:g} + {backward:g}",
        str(len(rows)),
    ]


def report(boards: Sequence[Board]) -> str:
    """The page of all teachers of which there are rows; best first."""
    parts = [
        "# Leaderboard",
        "",
        f"Variants at equal network evaluations of training, those of {VARIANTS[BASELINE].title} (a backward one "
        "counts as two). The learning rate is the best on seeds that are not reported; mean ± standard "
        "deviation over five others. What is not listed was not run yet. Written by `python benchmarks/leaderboard.py "
        "--stages report`.",
        "",
    ]
    for board in boards:
        found = {key: board.reported(method) for key, method in VARIANTS.items()}
        there = [rows for rows in found.values() if rows]
        if not there:
            continue
        columns = ON_MIXTURES if isinstance(board, MixtureBoard) else ON_SAMPLES
        lines = [line_of(board, columns, rows) for rows in grouped(board.references())]
        ranked = sorted(there, key=lambda rows: sum(row.score for row in rows) / len(rows))
        lines += [line_of(board, columns, rows) for rows in ranked]
        titles = (title for title, *_ in columns)
        header = ("variant", "steps", *titles, "learning rate", "updates", "evaluations of an update", "seeds")
        parts += [f"## {board.title}", "", markdown_table(header, lines), ""]
    return "\n".join(parts)


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """By method."""
    return [[row for row in rows if row.method == key] for key in dict.fromkeys(row.method for row in rows)]


def make_board(teacher: str, work_dir: Path, guidance_scale: float | None = None) -> Board:
    """The board of a mixture, of pictures or of clips."""
    return MixtureBoard(work_dir, teacher) if teacher in KINDS else EmbeddedBoard(work_dir, teacher, guidance_scale)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=TEACHERS)
    own = [key for key, method in VARIANTS.items() if not method.of_experts]
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=own)
    parser.add_argument("--stages", nargs="+", choices=("train", "report"), default=["train", "report"])
    parser.add_argument("--seeds", type=int, choices=range(1, len(REPORTED) + 1), default=len(REPORTED))
    parser.add_argument("--guidance_scale", type=float, help="of the teacher of pictures and clips, if another")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs" / "leaderboard")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "evidence" / "leaderboard.md")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, then report."""
    options = parse(arguments)
    torch.set_num_threads(1)
    boards = [make_board(teacher, options.work_dir, options.guidance_scale) for teacher in options.teachers]
    methods = [VARIANTS[key] for key in options.variants]
    if "train" in options.stages:
        for board in boards:
            for row in board.work(methods, REPORTED[: options.seeds]):
                print(f"{row.teacher} {row.method} lr {row.lr:g} seed {row.seed}: {row.score:.5f}", flush=True)
    if "report" in options.stages:
        options.output.write_text(report(boards), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Variants of the method at equal network evaluations: ``python benchmarks/leaderboard.py``.

Every variant is trained on every teacher (seven mixtures, pictures, clips) at a grid of learning rates with seeds that
only decide on the rate, and then at the best one with five others, which are reported. The stage "shorter" trains the
same for parts of the evaluations, which says how long it takes to come as near to the teacher as --stages report asks.
What was trained is kept in --work_dir; a run that was cut off goes on where it was. The report is written of what is
there: the page, and the rows, the recommended method and the verdict on it in paper_claims.json beside it. With
--published it also keeps the rows of docs/evidence/paper_claims.json, so that a variant can be added without training
all others again. Definitions are in docs/evidence/README.md.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.claims.common.board import REPORTED, SHARES, Board
from benchmarks.claims.common.evidence import (
    Row,
    Spread,
    markdown_table,
    read_evidence,
    rows_of,
    spread,
    update_board,
)
from benchmarks.claims.common.files import check_rows, write_text
from benchmarks.claims.common.summary import write_summary
from benchmarks.claims.common.variants import BASELINE, VARIANTS
from benchmarks.claims.common.verdict import write_verdict
from benchmarks.claims.embedded.board import EmbeddedBoard
from benchmarks.claims.embedded.gallery import Gallery
from benchmarks.claims.mixture.board import MixtureBoard
from benchmarks.claims.mixture.kinds import KINDS
from pdmd_core.arguments import number, output_file

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
GOALS = {"pictures": 0.06, "clips": 14.0}
"""Frechet distances; the time until a variant's mean is there is the number by which variants are ranked."""
PUBLISHED = ROOT / "docs" / "evidence" / "leaderboard.md"
CLAIMS = "paper_claims.json"
"""Beside a page."""
SAMPLES = "variants"
"""Part of the names of pictures."""


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
        method.title if method else board.reference_titles[first.method],
        str(first.network_evaluations or ""),
        *(cell(column, scale, digits) for _, column, scale, digits in columns),
        f"{first.lr:g}" if first.lr else "",
        str(first.updates or ""),
        "" if method is None else f"{forward:g} + {backward:g}",
        str(len(rows)),
    ]


def report(boards: Sequence[Board], samples: bool = False, guidance_scale: float | None = None) -> str:
    """The page of all teachers of which there are rows, best first; with the pictures of ``write_samples``."""
    head = [
        "# Leaderboard",
        "",
        f"Variants at equal network evaluations of training, those of {VARIANTS[BASELINE].title} (a backward one "
        "counts as two). The learning rate is the best on seeds that are not reported; mean ± standard "
        "deviation over others. What is not listed was not run yet. Written by `python benchmarks/leaderboard.py "
        f"--stages report{'' if guidance_scale is None else f' --guidance_scale {guidance_scale:g}'}`.",
        "",
    ]
    parts: list[str] = []
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
        timed = [
            seconds for rows in there for row in rows if (seconds := row.extra.get("processor_seconds")) is not None
        ]
        if timed:
            parts += [
                f"{len(timed)} of these trainings took {sum(timed) / 3600:.1f} processor hours together, without the "
                "search of learning rates.",
                "",
            ]
        if (goal := GOALS.get(board.title)) is not None:
            parts += time_to(goal, board)
        if samples and isinstance(board, EmbeddedBoard) and (shown := board.shown()):
            parts += Gallery(board.study).markdown(SAMPLES, [title for title, _ in shown])
    check_rows(parts)
    return "\n".join([*head, *parts])


def time_to(goal: float, board: Board) -> list[str]:
    """Trainings of parts of the evaluations, and the shortest of each variant whose mean distance meets the goal.

    Of variants that were trained with all of the evaluations alone, that training is a bound.
    """
    lines: list[tuple[float, list[str]]] = []
    for method in VARIANTS.values():
        cells: list[str] = []
        reached, soonest = ["not reached", ""], math.inf
        for share in reversed(SHARES):
            rows = board.reported(method, share)
            timed = all("processor_seconds" in row.extra for row in rows)
            score, seconds = spread(rows, "score"), spread(rows, "processor_seconds") if timed else None
            cells.insert(0, score.text(1, 4) if score else "")
            if score is not None and score.mean <= goal:
                reached = [seconds.text(1, 0) if seconds else "not timed", str(board.updates(method, share))]
                soonest = seconds.mean if seconds else sys.float_info.max
        if there := [cell for cell in cells if cell]:
            if len(there) == 1 and reached[0] != "not reached":
                reached[0] = f"at most {reached[0]}"
            command = f"`--stages shorter --teachers {board.title} --variants {method.key}`"
            lines.append((soonest, [method.title, *cells, *reached, command]))
    if not lines:
        return []
    header = (
        "variant",
        *(f"{share:.0%} of the evaluations" for share in SHARES),
        f"processor seconds until {goal:g}",
        "updates",
        "python benchmarks/leaderboard.py",
    )
    ranked = [line for _, line in sorted(lines, key=lambda line: line[0])]
    return [f"### {board.title}: processor time until {goal:g}", "", markdown_table(header, ranked), ""]


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
    stages = ("train", "shorter", "report")
    parser.add_argument("--stages", nargs="+", choices=stages, default=["train", "report"])
    parser.add_argument("--seeds", type=int, choices=range(1, len(REPORTED) + 1), default=len(REPORTED))
    parser.add_argument("--guidance_scale", type=number(1), help="of the teacher of pictures and clips, if another")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs" / "leaderboard")
    parser.add_argument(
        "--published",
        action="store_true",
        help="rows of docs/evidence/paper_claims.json stay where --work_dir has none, and their learning rates are not "
        "searched again; of the teachers in --teachers, samples are drawn anew, for which their first seed is trained",
    )
    parser.add_argument(
        "--output",
        type=output_file(".md"),
        help="the page (default: docs/evidence/leaderboard.md; printed for another guidance)",
    )
    options = parser.parse_args(arguments)
    if options.guidance_scale is not None and options.published:
        parser.error("--published rows are of the usual guidance: give it without --guidance_scale")
    if options.guidance_scale is not None and (without := sorted({*options.teachers} & {*KINDS})):
        parser.error(f"--guidance_scale is of pictures and clips, found {', '.join(without)}: name them in --teachers")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, then report."""
    options = parse(arguments)
    torch.set_num_threads(1)
    page = options.output or PUBLISHED
    published = rows_of(read_evidence(PUBLISHED.with_name(CLAIMS)), "leaderboard") if options.published else []

    def board_of(teacher: str) -> Board:
        board = make_board(teacher, options.work_dir, options.guidance_scale)
        board.published = [row for row in published if row.teacher == teacher]
        return board

    boards = [board_of(teacher) for teacher in options.teachers]
    methods = [VARIANTS[key] for key in options.variants]
    shares = [*([1.0] if "train" in options.stages else []), *(SHARES if "shorter" in options.stages else [])]
    for board in boards if shares else []:
        for row in board.work(methods, REPORTED[: options.seeds], shares):
            print(f"{row.teacher} {row.method} lr {row.lr:g} seed {row.seed}: {row.score:.5f}", flush=True)
    if "report" not in options.stages:
        return
    if options.guidance_scale is None:
        everything = {teacher: board_of(teacher) for teacher in TEACHERS}
        write_text(page, report(list(everything.values()), samples=True))
        write_samples(boards if options.published else everything.values(), page.parent)
        write_evidence_of(everything, page.parent)
    elif options.output is None:
        print(report(boards, guidance_scale=options.guidance_scale))
    else:
        write_text(options.output, report(boards, guidance_scale=options.guidance_scale))


def write_samples(boards: Iterable[Board], folder: Path) -> None:
    """Pictures and clips of variants side by side."""
    for board in boards:
        if isinstance(board, EmbeddedBoard) and (shown := board.shown()):
            Gallery(board.study).write(folder, SAMPLES, shown)


def write_evidence_of(boards: Mapping[str, Board], folder: Path) -> None:
    """The rows of the boards and the recommended methods in paper_claims.json, and the pages that are made of it."""
    for teacher, board in boards.items():
        rows = []
        for method in VARIANTS.values():
            for share in SHARES:
                rows += [replace(row, extra={**row.extra, "share": share}) for row in board.reported(method, share)]
        method = VARIANTS[board.recommended]
        lr = board.chosen(method)
        named = None if lr is None else {"method": method.key, "objective": dict(method.objective), "lr": lr}
        update_board(folder / CLAIMS, teacher, named, rows)
    write_summary(folder)
    write_verdict(folder)


if __name__ == "__main__":
    main()

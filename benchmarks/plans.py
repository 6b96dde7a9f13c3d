"""Which plan for how many steps: ``python benchmarks/plans.py``.

Every plan is trained on every teacher at two shifts and at the network evaluations of the leaderboard, and sampled in
its own steps and refined to 4, 6, 8 and 16. What was trained is kept in --work_dir, where it is what the leaderboard
keeps there too; a run that was cut off goes on. The report is written of what is there.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.claims.common.board import REFINED, REPORTED, Board
from benchmarks.claims.common.evidence import Row, Spread, markdown_table, spread
from benchmarks.claims.common.files import check_rows, write_text
from benchmarks.claims.common.methods import Method
from benchmarks.claims.common.variants import VARIANTS
from benchmarks.claims.embedded.board import EmbeddedBoard
from benchmarks.claims.embedded.study import EmbeddedStudy
from benchmarks.claims.mixture.board import MixtureBoard
from benchmarks.leaderboard import TEACHERS, make_board
from pdmd_core.arguments import output_file

ROOT = Path(__file__).resolve().parents[1]
SHIFTS = (0.5, 1.0, 3.0, 5.0)
"""Those that are reported where there are rows."""
SHIPPED_GUIDANCE = 3.0
"""Of the teacher of the shipped experts."""
_STEP = {"fake_rollouts": "per_step"}
PLANS = {
    method.key: method
    for method in (
        VARIANTS["dmd_sgts"],
        VARIANTS["4_step"],
        VARIANTS["phased_2x2"],
        VARIANTS["2x2_step"],
        Method("1_1_2", "1 + 1 + 2", (1, 1, 2)),
        Method("1_1_2_step", "1 + 1 + 2, a fake for each step", (1, 1, 2), _STEP),
        VARIANTS["phased_4x1"],
        VARIANTS["2x1"],
        Method("2_6", "2 + 6", (2, 6)),
        Method("2_6_step", "2 + 6, a fake for each step", (2, 6), _STEP),
    )
}
"""By key. Where phases have several steps, with the blend of truncations and with a fake for each step."""


def at_shift(board: Board, method: Method, shift: float) -> Method:
    """A plan at a shift; at that of the teacher it is the leaderboard's own."""
    return method if shift == board.shift else replace(method, key=f"{method.key}-shift-{shift:g}", shift=shift)


def line_of(board: Board, method: Method, rows: Sequence[Row]) -> list[str]:
    """A plan on a teacher: its score, in its own steps and in more, and the measures beside it."""
    scale, digits = (1e4, 1) if isinstance(board, MixtureBoard) else (1.0, 4)

    def refined(steps: int) -> str:
        if steps == sum(method.steps):
            return own
        lr = board.chosen(method)
        assert lr is not None
        found = [board.refined(run, steps) for run in board.runs(method, [lr], REPORTED) if board.row(run)]
        values = [value for value in found if value is not None]
        return Spread.of(values).text(scale, digits) if values else ""

    def cell(column: str, scale: float, digits: int) -> str:
        found = spread(rows, column)
        return "" if found is None else found.text(scale, digits)

    own = cell("score", scale, digits)
    beside = [cell("mode_weight_error", 100, 2)] if isinstance(board, MixtureBoard) else [cell("diversity", 1, 4)]
    of_plan = [method.title, "[" + ", ".join(map(str, method.steps)) + "]", str(sum(method.steps))]
    trained = [f"{rows[0].lr:g}", str(rows[0].updates), str(len(rows))]
    return [*of_plan, own, *map(refined, REFINED), *beside, *trained]


def refined_experts(study: EmbeddedStudy) -> list[str]:
    """The section of the shipped experts in more steps, as far as they were measured."""
    lines = []
    for steps in REFINED:
        seeds = [seed for seed in REPORTED if study.has_reference(f"experts_{steps}", seed)]
        rows = [study.reference_row(f"experts_{steps}", seed) for seed in seeds]
        columns = (("frechet", 1.0, 4), ("diversity", 1.0, 4), ("agreement", 100.0, 1))
        found = [(spread(rows, name), scale, digits) for name, scale, digits in columns]
        cells = [value.text(scale, digits) for value, scale, digits in found if value]
        lines += [[str(steps), *cells, str(len(rows))]] if rows else []
    if not lines:
        return []
    header = ("steps", "Frechet distance", "diversity", "agreement with the prompt, %", "seeds of noise")
    return ["## The shipped experts [2, 2], shift 5, in more steps", "", markdown_table(header, lines), ""]


def report(boards: Sequence[Board], study: EmbeddedStudy) -> str:
    """The page of all teachers and shifts of which there are rows; best first."""
    head = [
        "# Plans",
        "",
        "Plans at equal network evaluations of training, those of 2 x 2 with SGTS. The learning rate is the best on "
        "seeds that are not reported; mean ± standard deviation over others. On mixtures the score is the kernel "
        "distance x 10^4, on pictures and clips the Frechet distance to the teacher. *In more steps* are samples of "
        "the same experts with the plan refined. What is not listed was not run yet. Written by "
        "`python benchmarks/plans.py --stages report`.",
        "",
    ]
    parts: list[str] = []
    for board in boards:
        beside = "error of mode weights, %" if isinstance(board, MixtureBoard) else "diversity"
        steps = [f"in {number} steps" for number in REFINED]
        header = ("plan", "steps of phases", "steps", "score", *steps, beside, "learning rate", "updates", "seeds")
        for shift in SHIFTS:
            found = [(method, board.reported(method)) for m in PLANS.values() for method in [at_shift(board, m, shift)]]
            there = [(method, rows) for method, rows in found if rows]
            there.sort(key=lambda pair: sum(row.score for row in pair[1]) / len(pair[1]))
            if there:
                name = board.title.partition(", shift")[0]
                lines = [line_of(board, method, rows) for method, rows in there]
                parts += [f"## {name}, shift {shift:g}", "", markdown_table(header, lines), ""]
    parts += refined_experts(study)
    check_rows(parts)
    return "\n".join([*head, *parts])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=["ring_5", "rising", "grid", "pictures"])
    parser.add_argument("--plans", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--shifts", nargs="+", type=float, choices=SHIFTS, default=(5.0, 3.0))
    parser.add_argument("--seeds", type=int, choices=range(1, len(REPORTED) + 1), default=len(REPORTED))
    stages = ("shipped", "train", "report")
    parser.add_argument(
        "--stages", nargs="+", choices=stages, default=stages, help="shipped: the experts in the repository"
    )
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs" / "leaderboard")
    parser.add_argument("--output", type=output_file(".md"), default=ROOT / "docs" / "evidence" / "plans.md")
    return parser.parse_args(arguments)


def train(board: Board, plans: Sequence[Method], seeds: Sequence[int]) -> None:
    """Train and measure what is not there yet."""
    for plan in plans:
        for row in board.work([plan], seeds):
            print(f"{row.teacher} {row.method} lr {row.lr:g} seed {row.seed}: {row.score:.5f}", flush=True)
        lr = board.chosen(plan)
        assert lr is not None
        for run in board.runs(plan, [lr], seeds):
            board.refine(run)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, then report."""
    options = parse(arguments)
    torch.set_num_threads(1)
    boards = [make_board(teacher, options.work_dir) for teacher in options.teachers]
    study = EmbeddedBoard(options.work_dir, "pictures", SHIPPED_GUIDANCE).study
    if "shipped" in options.stages:
        study.prepare()
        for seed in REPORTED[: options.seeds]:
            for steps in REFINED:
                row = study.reference_row(f"experts_{steps}", seed)
                print(f"shipped experts in {steps} steps, seed {seed}: {row.score:.5f}", flush=True)
    if "train" in options.stages:
        for board in boards:
            for shift in options.shifts:
                train(board, [at_shift(board, PLANS[key], shift) for key in options.plans], REPORTED[: options.seeds])
    if "report" in options.stages:
        everything = [make_board(teacher, options.work_dir) for teacher in TEACHERS]
        write_text(options.output, report(everything, study))


if __name__ == "__main__":
    main()

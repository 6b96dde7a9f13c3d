"""Compare phase experts with their teacher: distance to its many-step samples, diversity, time, pictures.

    python training/evaluate.py --experts runs/demo/experts --output_dir runs/demo

Writes report.md, report.json and pictures. The teacher's many-step samples are the reference; a second set of them
with other seeds shows the noise floor of the distance. Features are those of the embedded feature network (FD-Emoji).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from training.evaluation import Row

DEFAULT_PROMPTS = Path(__file__).resolve().parent / "prompts" / "embedded_eval.txt"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=Path, required=True, help="experts folder of a distillation")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the report goes")
    parser.add_argument("--teacher", help="diffusers pipeline (default: the base named by the experts)")
    parser.add_argument(
        "--prompts", type=Path, default=DEFAULT_PROMPTS, help=f"text file (default: {DEFAULT_PROMPTS.name})"
    )
    parser.add_argument("--seeds", type=int, default=10, help="samples for each prompt (default: 10)")
    parser.add_argument("--teacher_steps", type=int, default=40, help="steps of the reference (default: 40)")
    parser.add_argument("--shift", type=float, help="shift of the teacher's steps (default: that of the experts' plan)")
    parser.add_argument("--guidance_scale", type=float, help="guidance of the teacher (default: as distilled)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    options = make_parser().parse_args(arguments)
    from training.command_line import exit_status

    return exit_status("evaluate.py", lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Sample all methods, measure, write the report."""
    from pdmd_core.experts import PhasedExperts
    from training.evaluation import Evaluation
    from training.pictures import labelled_columns
    from training.prompts import read_prompts

    experts = PhasedExperts.open(options.experts)
    prompts = read_prompts(options.prompts)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    evaluation = Evaluation(
        experts,
        prompts,
        options.seeds,
        options.output_dir / "cache",
        options.teacher,
        options.teacher_steps,
        options.shift,
        options.guidance_scale,
    )
    results = [
        evaluation.measure_teacher(options.teacher_steps),
        evaluation.measure_teacher(len(evaluation.plan.sigmas)),
        evaluation.measure_experts(),
    ]
    columns = []
    for row, pixels in results:
        middle = pixels[:, pixels.shape[1] // 2].unflatten(0, (len(prompts), options.seeds))
        columns.append((row.method, middle[::6, :4][:8]))
    labelled_columns(columns, prompts[::6][:8]).save(options.output_dir / "report.png")
    write_report(
        options.output_dir, [row for row, _ in results], evaluation.plan.describe(), len(prompts), options.seeds
    )
    print((options.output_dir / "report.md").read_text(encoding="utf-8"))
    print(f"report: {options.output_dir / 'report.md'} (picture: {options.output_dir / 'report.png'})")
    return 0


def write_report(folder: Path, rows: list[Row], plan: str, prompts: int, seeds: int) -> None:
    """report.json and report.md."""
    data = {"prompts": prompts, "seeds": seeds, "features": "FD-Emoji", "rows": [asdict(row) for row in rows]}
    (folder / "report.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    lines = [
        "# Phase experts against their teacher",
        "",
        "![same prompts and seeds: teacher, teacher with few steps, phase experts](report.png)",
        "",
        "| method | network evaluations | FD-Emoji to the teacher | diversity | prompt agreement | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r.method} | {r.network_evaluations} | {r.frechet:.4g} | {r.diversity:.4g} | {r.agreement:.1%} "
        f"| {r.seconds:.1f} |"
        for r in rows
    ]
    lines += [
        "",
        f"{prompts * seeds} samples a method: {prompts} prompts, {seeds} seeds. FD-Emoji is the Frechet distance in "
        "the style features of the embedded classifier (training/embedded/features.py) to other samples of the "
        "many-step teacher, whose own row is the noise floor. Diversity is the mean distance of layout features "
        "between seeds of one prompt. Seconds are network time on this machine.",
        "",
        "```text",
        plan,
        "```",
        "",
    ]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

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
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_PROMPTS = Path(__file__).resolve().parent / "prompts" / "embedded_eval.txt"


@dataclass(frozen=True)
class Row:
    """One method in the report."""

    method: str
    network_evaluations: int
    """For one sample, guidance counted as two."""
    frechet: float
    """FD-Emoji to the reference samples."""
    diversity: float
    """Mean feature distance between seeds of one prompt."""
    agreement: float
    """Share of samples whose emoji and background the classifier names as the prompt does."""
    seconds: float
    """Time of the network evaluations for all samples, on this machine."""


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
    """Run; returns the exit status. Problems a user can solve are one line on standard error and status 2."""
    options = make_parser().parse_args(arguments)
    from pdmd_core.experts import ExpertsError
    from training.prompts import PromptError
    from training.teacher import TeacherError

    try:
        return run(options)
    except (ExpertsError, PromptError, TeacherError, ValueError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Sample all methods, measure, write the report."""
    import torch

    from pdmd_core.experts import PhasedExperts
    from pdmd_core.metrics import frechet_distance, pairwise_distance
    from training.embedded.features import features_of, load_features
    from training.pictures import labelled_columns
    from training.prompts import read_prompts
    from training.sampler import Sampler, SampleSize

    experts = PhasedExperts.open(options.experts)
    manifest = experts.manifest
    plan, training = manifest.plan, manifest.training
    prompts = read_prompts(options.prompts)
    width, height, frames = training.get("size", (64, 64, 1))
    size = SampleSize(height, width, frames, training.get("max_sequence_length", 512))
    shift = options.shift or plan.shift or 3.0
    guidance = options.guidance_scale or training.get("teacher_guidance_scale", 4.0)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    sampler = Sampler(options.teacher or manifest.base.model, size, prompts, options.output_dir / "cache", experts)
    network, emoji, backgrounds = load_features()

    def pairs(first_seed: int) -> list[tuple[int, int]]:
        return [(p, first_seed + s) for p in range(len(prompts)) for s in range(options.seeds)]

    def teacher(steps: int, first_seed: int) -> Tensor:
        name = f"teacher, {steps} steps"
        return sampler.with_teacher(pairs(first_seed), steps, shift, guidance, name)

    few, many = len(plan.sigmas), options.teacher_steps
    groups = torch.arange(len(prompts)).repeat_interleave(options.seeds)
    wanted_emoji, wanted_background = wanted_classes(prompts, emoji, backgrounds)
    reference, _, _ = features_of(network, sampler.decode(teacher(many, 1_000_000)))
    methods = [
        (f"teacher, {many} steps with guidance", many * 2, lambda: teacher(many, 0)),
        (f"teacher, {few} steps with guidance", few * 2, lambda: teacher(few, 0)),
        (f"phase experts, {few} steps", few, lambda: sampler.with_experts(pairs(0))),
    ]
    rows, columns = [], []
    for name, evaluations, make in methods:
        start = time.perf_counter()
        latents = make()
        seconds = time.perf_counter() - start
        pixels = sampler.decode(latents)
        features, found_emoji, found_background = features_of(network, pixels)
        agrees = (found_emoji == wanted_emoji[groups]) & (found_background == wanted_background[groups])
        rows.append(
            Row(
                method=name,
                network_evaluations=evaluations if guidance != 1 or "experts" in name else evaluations // 2,
                frechet=round(frechet_distance(features, reference), 4),
                diversity=round(pairwise_distance(features, groups), 4),
                agreement=round(float(agrees.float().mean()), 4),
                seconds=round(seconds, 2),
            )
        )
        middle = pixels[:, pixels.shape[1] // 2].unflatten(0, (len(prompts), options.seeds))
        columns.append((name, middle[:8, :4]))
    labelled_columns(columns, prompts[:8]).save(options.output_dir / "report.png")
    write_report(options.output_dir, rows, manifest.plan.describe(), len(prompts), options.seeds)
    print((options.output_dir / "report.md").read_text(encoding="utf-8"))
    print(f"report: {options.output_dir / 'report.md'} (picture: {options.output_dir / 'report.png'})")
    return 0


def wanted_classes(prompts: list[str], emoji: list[str], backgrounds: list[str]) -> tuple[Tensor, Tensor]:
    """Class indices that each prompt names; -1 where it names none."""
    import torch

    def find(text: str, names: list[str]) -> int:
        return next((i for i, name in enumerate(names) if name in text), -1)

    subjects, places = zip(*((p.partition(" on a ")[0], p.partition(" on a ")[2]) for p in prompts), strict=True)
    return (
        torch.tensor([find(subject, emoji) for subject in subjects]),
        torch.tensor([find(place, backgrounds) for place in places]),
    )


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
        f"| {r.method} | {r.network_evaluations} | {r.frechet:.3f} | {r.diversity:.3f} | {r.agreement:.1%} "
        f"| {r.seconds:.1f} |"
        for r in rows
    ]
    lines += [
        "",
        f"{prompts * seeds} samples a method: {prompts} prompts, {seeds} seeds. FD-Emoji is the Frechet distance in "
        "the features of the embedded classifier; the first row, the same teacher with other seeds, is its floor. "
        "Diversity is the mean feature distance between seeds of one prompt. Seconds are network time on this machine.",
        "",
        "```text",
        plan,
        "```",
        "",
    ]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

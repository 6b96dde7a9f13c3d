"""Compare phase experts with their teacher: quality, diversity, prompt agreement, motion, time, pictures.

    python training/evaluate.py --experts runs/demo/experts --output_dir runs/demo
    python training/evaluate.py --experts phased=runs/a/experts sgts=runs/b/experts --output_dir runs/compared \\
        --teacher Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts prompts.txt --seeds 8 --dtype bfloat16
    python training/evaluate.py --experts runs/demo/experts --output_dir runs/demo --metrics frechet coverage

The first method is the teacher in many steps. It is measured against other samples of itself, so its row says how small
a distance can be (the noise floor); then comes the teacher in as few steps as the experts, then each folder of experts.
All of them sample the same prompts with the same seeds. Written are report.md and report.json (every number with its
95 % interval) and pictures: report.png, and report/ with all seeds of a prompt; GIFs too for clips.

Everything that is computed is kept in the cache folder: a run that was stopped goes on where it was, and more seeds,
prompts, experts or metrics only cost what is new.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pdmd_core.experts import PhasedExperts
    from training.evaluation.comparison import Setting
    from training.evaluation.evaluation import Evaluation, Method
    from training.evaluation.measures import Space
    from training.evaluation.report import Report, Row

DEFAULT_PROMPTS = Path(__file__).resolve().parent / "prompts" / "embedded_eval.txt"
SPACES = ("emoji", "efflite0", "dinov3")


def make_parser() -> argparse.ArgumentParser:
    """The command line; the epilog lists the metrics."""
    from training.evaluation.comparison import METRICS

    metrics = "\n".join(f"  {name:14}{metric.text}" for name, metric in METRICS.items())
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description=__doc__,
        epilog=f"metrics (docs/evaluation.md says what they mean):\n{metrics}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--experts", nargs="+", required=True, metavar="[NAME=]FOLDER", help="experts folders of distillations"
    )
    what.add_argument("--output_dir", type=Path, required=True, help="where the report goes")
    what.add_argument("--teacher", help="diffusers pipeline, folder or Hub id (default: the base of the first experts)")
    what.add_argument("--pipeline", help="diffusers class, if not the one that the teacher names")
    what.add_argument(
        "--prompts",
        type=Path,
        default=DEFAULT_PROMPTS,
        help=f"a prompt a line; or .jsonl with a prompt and an image a line (default: {DEFAULT_PROMPTS.name})",
    )
    what.add_argument("--seeds", type=int, default=10, help="samples for each prompt (default: 10)")
    what.add_argument(
        "--few_steps", type=int, nargs="*", help="rows of the teacher in these steps (default: the experts')"
    )
    what.add_argument("--no_noise_floor", action="store_true", help="leave out the row of the teacher in many steps")
    what.add_argument("--data", type=Path, help="folder of real pictures or clips, for data_frechet")

    how = parser.add_argument_group("how it is measured")
    how.add_argument("--metrics", nargs="+", metavar="NAME", help="see below (default: all that apply)")
    how.add_argument(
        "--features",
        nargs="+",
        choices=SPACES,
        help="networks to measure in (default: emoji if the prompts are the embedded teacher's, otherwise efflite0; "
        "and dinov3 with its weights)",
    )
    how.add_argument("--dino_weights", type=Path, metavar="FOLDER", help="a DINOv3 model in the format of transformers")
    how.add_argument(
        "--lpips_weights",
        type=Path,
        nargs=2,
        metavar=("BACKBONE", "HEADS"),
        help="alexnet-owt-7be5be79.pth of torchvision, alex.pth of lpips 0.1",
    )

    sampling = parser.add_argument_group("how the teacher samples (default: as it was distilled)")
    sampling.add_argument("--teacher_steps", type=int, default=40, help="steps of the reference (default: 40)")
    sampling.add_argument("--shift", type=float, help="shift of the teacher's steps")
    sampling.add_argument("--guidance_scale", type=float, help="guidance of the teacher; 1 is none")
    sampling.add_argument("--negative_prompt", help="what guidance moves away from")
    sampling.add_argument("--height", type=int, help="pixels")
    sampling.add_argument("--width", type=int, help="pixels")
    sampling.add_argument("--frames", type=int, help="frames of a clip")
    sampling.add_argument("--max_sequence_length", type=int, help="tokens to which prompts are padded")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cuda, cuda:1, cpu ... (default: a GPU if there is one)")
    machine.add_argument("--batch_size", type=int, help="samples at once (default: 1 for large samples, up to 64)")
    machine.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the networks (default: float32; large teachers take bfloat16)",
    )
    machine.add_argument(
        "--cache_dir", type=Path, help="what is kept; share it between reports (default: OUTPUT_DIR/cache)"
    )
    machine.add_argument("--shown_prompts", type=int, default=8, help="prompts in the pictures (default: 8)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    options = make_parser().parse_args(arguments)
    from training.config.command_line import exit_status

    return exit_status("evaluate.py", lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Sample all methods, measure, write the report."""
    from training.evaluation.comparison import METRICS, MOVING
    from training.evaluation.evaluation import REFERENCE_SEED, Method, compare
    from training.evaluation.measures import Measure, MotionMeasure, Preview
    from training.evaluation.report import Row, write_pictures

    experts = named_experts(options.experts)
    evaluation = make_evaluation(options, experts)
    setting, metrics, left_out = make_setting(options, evaluation)
    methods = make_methods(options, evaluation, experts)
    reference = Method("reference", steps=options.teacher_steps, first_seed=REFERENCE_SEED)
    compared = any(METRICS[name].to_teacher for name in metrics)
    measures: list[Measure] = [*setting.spaces, Preview()]
    if MOVING & set(metrics):
        measures.append(MotionMeasure())

    evaluation.sample([*methods, reference] if compared else methods)
    seen = [(method.name, evaluation.look(method, measures)) for method in methods]
    of_reference = evaluation.look(reference, measures) if compared else {}
    if "data_frechet" in metrics:
        setting = replace(setting, data=evaluation.look_at_data(options.data, setting.spaces))
    found = compare(setting, metrics, seen, of_reference)

    options.output_dir.mkdir(parents=True, exist_ok=True)
    prompts = [example.prompt for example in evaluation.examples]
    previews = [(name, of["preview"]["frames"].unflatten(0, (-1, options.seeds))) for name, of in seen]
    pictures = write_pictures(options.output_dir, prompts, evenly(len(prompts), options.shown_prompts), previews)
    rows = [Row(m.name, evaluation.evaluations(m), evaluation.seconds(m), found[m.name]) for m in methods]
    report = make_report(options, evaluation, rows, setting.spaces[0].label, experts, left_out)
    report.write(options.output_dir, pictures)
    print((options.output_dir / "report.md").read_text(encoding="utf-8"))
    print(f"report: {options.output_dir / 'report.md'} (picture: {options.output_dir / 'report.png'})")
    return 0


def named_experts(items: Sequence[str]) -> dict[str, PhasedExperts]:
    """Name of the method to experts, from FOLDER or NAME=FOLDER. Raises UserError, ExpertsError."""
    from pdmd_core.experts import PhasedExperts
    from training.config.command_line import UserError

    found: dict[str, PhasedExperts] = {}
    for item in items:
        name, equals, folder = item.partition("=")
        if not equals or Path(item).is_dir():
            name, folder = "", item
        experts = PhasedExperts.open(folder)
        steps = len(experts.manifest.plan.sigmas)
        if not name:
            place = Path(folder).resolve()
            own = place.parent.name if place.name == "experts" else place.name
            name = f"{'phase experts' if len(items) == 1 else own}, {steps} step{'' if steps == 1 else 's'}"
        if name in found:
            raise UserError(f"--experts: two are called {name!r}: give them names of their own, as in NAME={folder}")
        found[name] = experts
    return found


def make_evaluation(options: argparse.Namespace, experts: dict[str, PhasedExperts]) -> Evaluation:
    """Teacher, size, prompts and seeds: what the options say, otherwise what the first experts were distilled with."""
    import torch

    from training.config.command_line import UserError
    from training.data.buckets import SampleSize
    from training.data.examples import read_examples
    from training.data.teacher import TeacherSource
    from training.evaluation.evaluation import Evaluation, Machine, Teacher

    for name, least in (("batch_size", 1), ("shown_prompts", 1), ("guidance_scale", 0)):
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise UserError(f"--{name}: expected at least {least}, found {getattr(options, name)}")
    first = next(iter(experts.values())).manifest
    sizes = {tuple(e.manifest.training.get("size", (64, 64, 1))): name for name, e in experts.items()}
    if len(sizes) > 1 and not (options.height and options.width and options.frames):
        given = ", ".join(f"{name} {'x'.join(map(str, size))}" for size, name in sizes.items())
        raise UserError(f"experts of different sizes: {given}: choose one with --width, --height and --frames")
    width, height, frames = first.training.get("size", (64, 64, 1))
    size = SampleSize(
        options.height or height,
        options.width or width,
        options.frames or frames,
        options.max_sequence_length or first.training.get("max_sequence_length", 512),
    )
    revision = first.base.revision if options.teacher in (None, first.base.model) else None
    pipeline = options.pipeline or first.training.get("pipeline")
    negative, guidance = options.negative_prompt, options.guidance_scale
    teacher = Teacher(
        TeacherSource(options.teacher or first.base.model, revision, pipeline),
        options.shift or first.plan.shift or 3.0,
        float(first.training.get("teacher_guidance_scale", 4.0)) if guidance is None else guidance,
        first.training.get("negative_prompt", "") if negative is None else negative,
    )
    machine = Machine(options.device, options.batch_size, getattr(torch, options.dtype))
    cache_dir = options.cache_dir or options.output_dir / "cache"
    return Evaluation(teacher, size, read_examples(options.prompts), options.seeds, cache_dir, machine)


def make_methods(
    options: argparse.Namespace, evaluation: Evaluation, experts: dict[str, PhasedExperts]
) -> list[Method]:
    """The rows of the report."""
    from pdmd_core.phases import PhasePlan
    from training.config.command_line import UserError
    from training.evaluation.evaluation import Method

    guided = " with guidance" if evaluation.teacher.guided else ""
    few = options.few_steps
    if few is None:
        few = sorted({len(e.manifest.plan.sigmas) for e in experts.values()})
    steps = [*([] if options.no_noise_floor else [options.teacher_steps]), *few]
    for number in [options.teacher_steps, *few]:
        PhasePlan.from_steps([number], evaluation.teacher.shift)  # says what is wrong with it
    methods = [
        Method(f"teacher, {number} step{'' if number == 1 else 's'}{guided}", steps=number)
        for number in dict.fromkeys(steps)
    ]
    methods += [Method(name, own) for name, own in experts.items()]
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--experts: {name!r} is the name of another row: choose another NAME=FOLDER")
    return methods


def make_setting(options: argparse.Namespace, evaluation: Evaluation) -> tuple[Setting, list[str], dict[str, str]]:
    """What is measured: networks, the names of the metrics, and those that too few samples leave out, with the reason.

    Raises UserError.
    """
    import torch

    from training.config.command_line import UserError
    from training.evaluation.comparison import METRICS, MOVING, Setting, inapplicable, shortage
    from training.evaluation.measures import (
        EMOJI_SIDE,
        EmojiSpace,
        load_lpips,
        load_space,
        speaks_of_emoji,
        wanted_classes,
    )
    from training.evaluation.sampler import default_device

    unknown = [name for name in options.metrics or [] if name not in METRICS]
    if unknown:
        raise UserError(f"--metrics: unknown {', '.join(unknown)}, expected some of: {', '.join(METRICS)}")
    size, prompts = evaluation.size, [example.prompt for example in evaluation.examples]
    small = (size.height, size.width) == (EMOJI_SIDE, EMOJI_SIDE)
    names = options.features
    if not names:
        names = ["emoji" if small and speaks_of_emoji(prompts) else "efflite0"]
        names += ["dinov3"] if options.dino_weights else []
    if "emoji" in names and not small:
        raise UserError(f"--features emoji is for samples of 64x64 pixels, found {size.width}x{size.height}")
    device = default_device(options.device)
    spaces: list[Space] = [
        load_space(name, options.dino_weights, evaluation.hashes, device) for name in dict.fromkeys(names)
    ]
    wanted = None
    has = {name for name, given in (("lpips", options.lpips_weights), ("data", options.data)) if given}
    for space in spaces:
        if isinstance(space, EmojiSpace):
            wanted = torch.stack(wanted_classes(prompts, space.emoji, space.backgrounds), dim=1)
            has |= {"classifier"} if bool((wanted >= 0).any()) else set()
    chosen, left_out = [], {}
    for name, metric in METRICS.items():
        if options.metrics and name not in options.metrics:
            continue
        reason = inapplicable(metric, size.frames, has)
        short = shortage(metric, len(prompts), options.seeds)
        if options.metrics and (reason or short):
            raise UserError(f"--metrics {name}: {reason or short}")
        if not reason and short:
            left_out[name] = short
        elif not reason:
            chosen.append(name)
    if MOVING & set(chosen) and importlib.util.find_spec("cv2") is None:
        raise UserError('motion needs OpenCV: pip install "phased-dmd[metrics]", or choose other --metrics')
    lpips = load_lpips(options.lpips_weights[0], options.lpips_weights[1], device) if "lpips" in chosen else None
    setting = Setting(len(prompts), options.seeds, size.frames, spaces, wanted, lpips, None)
    return setting, chosen, left_out


def make_report(
    options: argparse.Namespace,
    evaluation: Evaluation,
    rows: Sequence[Row],
    features: str,
    experts: dict[str, PhasedExperts],
    left_out: dict[str, str],
) -> Report:
    """What was measured, with the settings that a reader has to know."""
    from training.evaluation.report import Report

    teacher, size = evaluation.teacher, evaluation.size
    settings = {
        "teacher": teacher.source.path,
        "reference": f"{options.teacher_steps} steps, Euler, shift {teacher.shift:.4g}",
        "guidance": teacher.guidance_scale,
        "negative prompt": repr(teacher.negative_prompt),
        "size": f"{size.width}x{size.height}, {size.frames} frame{'' if size.frames == 1 else 's'}",
        "prompts": options.prompts.name,
        "networks in": options.dtype,
    }
    settings |= {name: f"experts in {own.folder}" for name, own in experts.items()}
    if options.data:
        settings["data"] = str(options.data)
    return Report(
        prompts=[example.prompt for example in evaluation.examples],
        seeds=evaluation.seeds,
        features=f"FD-{features}",
        rows=rows,
        settings=settings,
        plans={name: own.manifest.plan.describe() for name, own in experts.items()},
        not_measured=left_out,
        floor=None if options.no_noise_floor else rows[0].method,
    )


def evenly(count: int, wanted: int) -> list[int]:
    """At most so many indices, evenly spaced."""
    shown = min(count, wanted)
    return [i * count // shown for i in range(shown)]


if __name__ == "__main__":
    sys.exit(main())

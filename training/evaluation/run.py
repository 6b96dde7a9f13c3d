"""Comparing methods from their samples to the report in a folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pdmd_core.experts import PhasedExperts
from training.config.command_line import UserError
from training.evaluation.comparison import compare
from training.evaluation.evaluation import Evaluation
from training.evaluation.methods import REFERENCE_SEED, Method, methods_of, named_experts
from training.evaluation.report import Report, Row, write_pictures
from training.evaluation.request import Request
from training.evaluation.sampler import family_of_source
from training.evaluation.selection import Selection, select
from training.evaluation.vbench import write_clips


def write_report(request: Request) -> Path:
    """Sample all methods, measure them, and write report.md, report.json and pictures.

    What the cache holds is not computed again, so that a report whose samples are all there is only rendered anew.

    Args:
        request: What was asked for.

    Returns:
        The report for people.

    Raises:
        UserError: When the request cannot be done; nothing was sampled then.
        ExpertsError: When experts are damaged, or do not fit the teacher.
    """
    experts = named_experts(request.experts)
    evaluation = request.evaluation(experts)
    selection = select(request, evaluation)
    many = None if request.no_noise_floor else request.steps_of_reference
    methods = methods_of(evaluation.teacher, experts, many, request.few_steps, request.quantization, request.strengths)
    reference = Method("reference", steps=request.steps_of_reference, first_seed=REFERENCE_SEED)
    sampled = [*methods, reference] if selection.compares else methods
    request.refuse_unheard(evaluation.teacher, selection, {own.steps for own in sampled if own.experts is None})

    if request.vbench is not None:
        refuse_vbench(evaluation.size.frames)
    setting = selection.setting
    if (
        request.data is not None and "data_frechet" in selection.metrics
    ):  # before hours of sampling, since files can be wrong
        setting = replace(setting, data=evaluation.measure_data(request.data, setting.spaces))
    evaluation.sample(sampled, new=not request.no_sampling)
    measured = [(method.name, evaluation.measure(method, selection.measures)) for method in methods]
    of_reference = evaluation.measure(reference, selection.measures) if selection.compares else {}
    numbers = compare(setting, selection.metrics, measured, of_reference)

    request.output_dir.mkdir(parents=True, exist_ok=True)
    prompts = [example.prompt for example in evaluation.examples]
    previews = [(name, own["preview"]["frames"].unflatten(0, (-1, request.seeds))) for name, own in measured]
    shown = evenly_spaced(len(prompts), request.shown_prompts)
    pictures = write_pictures(request.output_dir, prompts, shown, previews)
    rows = [
        Row(own.name, evaluation.network_evaluations(own), evaluation.seconds(own), numbers[own.name])
        for own in methods
    ]
    _report(request, evaluation, selection, rows, experts).write(request.output_dir, pictures)
    if request.vbench is not None:
        rate = request.frame_rate or family_of_source(evaluation.teacher.source).frame_rate
        write_clips(request.vbench, evaluation, methods, rate)
    return request.output_dir / "report.md"


def refuse_vbench(frames: int) -> None:
    """Refuse clips for VBench where there are none, or where nothing writes them.

    Args:
        frames: Frames of a sample.

    Raises:
        UserError: What is missing.
    """
    if frames == 1:
        raise UserError("--vbench is for clips, these samples have 1 frame: leave it out")
    if importlib.util.find_spec("cv2") is None:
        raise UserError('--vbench needs OpenCV to write clips: pip install "phased-dmd[metrics]"')


def _report(
    request: Request,
    evaluation: Evaluation,
    selection: Selection,
    rows: Sequence[Row],
    experts: Mapping[str, PhasedExperts],
) -> Report:
    """The report, with the settings that a reader has to know."""
    teacher, size, spaces = evaluation.teacher, evaluation.size, selection.setting.spaces
    settings = {
        "teacher": teacher.source.path,
        "reference": f"{request.steps_of_reference} steps, Euler, shift {teacher.shift:.4g}",
        "guidance": teacher.guidance_scale,
        "negative prompt": repr(teacher.negative_prompt),
        "size": f"{size.width}x{size.height}, {size.frames} frame{'' if size.frames == 1 else 's'}",
        "prompts": Path(request.prompts).name if Path(request.prompts).exists() else request.prompts,
        "networks in": request.dtype,
    }
    settings |= {name: f"experts in {own.folder}" for name, own in experts.items()}
    if request.data is not None:
        settings["data"] = str(request.data)
    return Report(
        prompts=[example.prompt for example in evaluation.examples],
        seeds=evaluation.seeds,
        features=f"FD-{spaces[0].label}" if spaces else None,
        rows=rows,
        settings=settings,
        plans={name: own.manifest.plan.describe() for name, own in experts.items()},
        not_measured=selection.left_out,
        floor=None if request.no_noise_floor else rows[0].method,
        files={name: {e.name: e.sha256 for e in own.manifest.experts} for name, own in experts.items()},
    )


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """At most so many indices below ``count``, evenly spaced."""
    shown = min(count, wanted)
    return [i * count // shown for i in range(shown)]

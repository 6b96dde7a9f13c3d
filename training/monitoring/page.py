"""The page of a run: one HTML file that needs nothing else, made of the files that the run has written so far.

python -m training.monitoring.page runs/demo
"""

from __future__ import annotations

import base64
import html
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from training.config.command_line import UserError, exit_status
from training.config.moved import with_todays_keys
from training.config.schema import DistillConfig, parse_config, read_settings
from training.monitoring.jsonl import JsonLines, monitoring_log
from training.monitoring.plots import Curves, curves, timeline

SHOWN = 12
"""Validations on the page: the last one and others evenly spread; all stay in samples/."""
_STYLE = """
body {font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em; color: #222}
h1 {margin-bottom: 0} h2 {margin-top: 1.8em; border-bottom: 1px solid #ddd} svg {max-width: 100%; height: auto}
table {border-collapse: collapse} td, th {padding: .2em .9em .2em 0; text-align: left; vertical-align: top}
figure {display: inline-block; margin: 0 1em 1em 0} figcaption {color: #666; font-size: .85em}
.warning {background: #fff3d6; border-left: 4px solid #e69500; padding: .5em 1em; margin: .5em 0}
.fine {color: #2a7d2a} pre {background: #f6f6f6; padding: 1em; overflow: auto; font-size: .85em}
"""


def write_page(run: Path) -> Path:
    """``run/report.html`` of a run with a config.yaml. Raises UserError when there is none."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run}: no config.yaml in it; expected the output folder of training/distill.py")
    settings = with_todays_keys(read_settings(path))
    config = parse_config(settings, str(path))
    metrics = JsonLines(run / "metrics.jsonl").read()
    performance, validations, warnings = (
        monitoring_log(run, name).read() for name in ("performance", "validations", "warnings")
    )
    plan = config.plan.build()
    phases = [(p.name, 1 + sum(config.updates_of(i) for i in range(k))) for k, p in enumerate(plan.phases)]
    done, total = metrics[-1]["update"] if metrics else 0, sum(config.updates_of(k) for k in range(len(plan)))
    parts = [
        f"<h1>{html.escape(run.resolve().name)}</h1>",
        f"<p>{_state(run, done, total, performance)}</p>",
        _section("Warnings", _warnings(warnings)),
        _section("Plan", timeline(plan)),
        _section("Losses and gradients", _losses(metrics, phases)),
        _section("Samples", _samples(run, validations, config)),
        _section("What the samples show", _shown(run, validations, phases)),
        _section("Speed and memory", _speed(performance, phases)),
        _section("Checkpoints", _checkpoints(run)),
        _section("Configuration", f"<pre>{html.escape(yaml.safe_dump(settings, sort_keys=False))}</pre>"),
    ]
    title = f"<title>{html.escape(run.resolve().name)}</title>"
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8">{title}<style>{_STYLE}</style></head>'
    temporary = run / ".report.html.part"
    temporary.write_text(f"{head}<body>{''.join(parts)}</body></html>\n", encoding="utf-8")
    return temporary.replace(run / "report.html")


def teacher_picture(run: Path, phase: str) -> Path:
    """Where the small picture of the teacher's samples lies, as they look from the end of a phase; without suffix."""
    return run / "watch" / "teacher" / phase


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>\n{content}\n" if content else ""


def _state(run: Path, done: int, total: int, performance: Sequence[Mapping[str, float]]) -> str:
    if (run / "experts" / "phased_experts.json").exists() and done >= total:
        return f"Finished: {total} updates. The experts are in experts/."
    left = performance[-1]["seconds_left"] if performance else None
    rest = f", about {timedelta(seconds=round(left))} left" if left is not None else ""
    return f"{done} of {total} updates{rest}."


def _warnings(warnings: Sequence[Mapping[str, Any]]) -> str:
    if not warnings:
        return '<p class="fine">None.</p>'
    return "".join(
        f'<p class="warning">Update {w["update"]}, {html.escape(w["expert"])}: {html.escape(w["text"])}.</p>'
        for w in warnings
    )


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["update"], line[name]) for line in lines if isinstance(line.get(name), int | float)]


def _of(lines: Sequence[Mapping[str, Any]], **names: str) -> Curves:
    return {label.replace("_", " "): _points(lines, name) for label, name in names.items()}


def _losses(metrics: Sequence[Mapping[str, Any]], phases: Sequence[tuple[str, int]]) -> str:
    panels = {
        "fake loss": _of(metrics, fake="fake_loss"),
        "generator loss": _of(metrics, generator="generator_loss"),
        "fake/teacher distance": _of(metrics, distance="score_distance"),
        "gradient norms": _of(metrics, generator="generator_grad_norm", fake="fake_grad_norm"),
        "learning rate factor": _of(metrics, factor="lr_factor"),
    }
    return curves(panels, phases, logarithmic=("fake loss", "gradient norms"))


def _shown(run: Path, validations: Sequence[Mapping[str, Any]], phases: Sequence[tuple[str, int]]) -> str:
    """The numbers of samples, each beside that of the teacher's samples."""
    path = run / "watch" / "teacher.json"
    teacher = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    beside = [{"update": line["update"], **teacher.get(line["expert"], {})} for line in validations]
    names = {
        "distance to the teacher's samples": "teacher_distance",
        "difference between seeds": "diversity",
        "saturation": "saturation",
        "contrast": "contrast",
        "black or white": "clipped",
        "motion": "motion",
        "Frechet distance": "frechet",
        "difference between seeds in features": "feature_diversity",
    }
    panels = {}
    for title, name in names.items():
        panels[title] = {"samples": _points(validations, name)}
        if name not in ("teacher_distance", "frechet") and (points := _points(beside, name)):
            panels[title]["teacher"] = points
    return curves(panels, phases)


def _speed(performance: Sequence[Mapping[str, float]], phases: Sequence[tuple[str, int]]) -> str:
    panels = {
        "seconds per update": _of(performance, seconds="seconds_per_update"),
        "network evaluations per second": _of(performance, rate="evaluations_per_second"),
        "memory (GiB)": _of(performance, now="memory_gib", peak="peak_memory_gib"),
    }
    return curves(panels, phases)


def _samples(run: Path, validations: Sequence[Mapping[str, Any]], config: DistillConfig) -> str:
    folder, experts = run / "watch" / "samples", {line["name"]: line["expert"] for line in validations}
    names = [line["name"] for line in validations if (folder / f"{line['name']}.webp").exists()]
    if len(names) > SHOWN:
        names = [names[round(i * (len(names) - 1) / (SHOWN - 1))] for i in range(SHOWN)]
    figures, last = [], None
    for name in names:
        teacher = teacher_picture(run, experts[name])
        if experts[name] != last and teacher.with_suffix(".webp").exists():
            moves = experts[name] == experts[names[-1]]
            figures.append(_figure(teacher, f"the teacher, from the end of {experts[name]}", moves))
        last = experts[name]
        figures.append(_figure(folder / name, name, name == names[-1]))
    if not figures:
        return ""
    prompts = f" Prompts: {html.escape('; '.join(config.validation.prompts))}." if config.validation.prompts else ""
    same = f", the same noise as the teacher's samples in {config.validation.teacher_steps} steps" if last else ""
    return f"<p>One prompt a row, one seed a column, always the same ones{same}.{prompts}</p>{''.join(figures)}"


def _figure(path: Path, caption: str, moves: bool) -> str:
    """A small picture, or where it moves the clip, of a path without suffix."""
    kind = "gif" if moves and path.with_name(f"{path.name}.gif").exists() else "webp"
    content = base64.b64encode(path.with_name(f"{path.name}.{kind}").read_bytes()).decode()
    source = f"data:image/{kind};base64,{content}"
    return f'<figure><img src="{source}" alt=""><figcaption>{html.escape(caption)}</figcaption></figure>'


def _checkpoints(run: Path) -> str:
    from training.loop.checkpoints import list_checkpoints

    rows = [
        f"<tr><td>{path.name}</td><td>{sum(f.stat().st_size for f in path.rglob('*')) / 2**20:,.1f} MiB</td></tr>"
        for path in list_checkpoints(run / "checkpoints")
    ]
    manifest = run / "experts" / "phased_experts.json"
    if manifest.exists():
        for expert in json.loads(manifest.read_text(encoding="utf-8"))["experts"]:
            size = (manifest.parent / expert["file"]).stat().st_size / 2**20
            rows.append(f"<tr><td>experts/{html.escape(expert['file'])}</td><td>{size:,.1f} MiB</td></tr>")
    return f"<table><tr><th>file</th><th>size</th></tr>{''.join(rows)}</table>" if rows else ""


def main(arguments: list[str] | None = None) -> int:
    """Write the page of each run that is named; returns the exit status."""
    runs = sys.argv[1:] if arguments is None else arguments

    def run() -> int:
        if not runs:
            raise UserError("expected the output folder of a run, found nothing")
        for folder in runs:
            print(write_page(Path(folder)))
        return 0

    return exit_status("page", run)


if __name__ == "__main__":
    sys.exit(main())

"""Distil a diffusion model into few-step phase experts.

Configuration values are replaced by key.inner=value anywhere after the name of the program; the keys are listed below.
Values are YAML, as in plan.steps=[2,2] and ema_decay=null; text and paths are taken as they are.
SIGINT (Ctrl-C) and SIGTERM end a run after the update in progress, with a checkpoint and exit status 130 or 143; it
goes on with --resume.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on shared cores
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pdmd_core import arguments
from training.config.changes import check_allowed
from training.config.command_line import UserError, exit_status
from training.config.keys import fields_of
from training.config.moved import MOVED
from training.config.schema import DistillConfig, load_config

if TYPE_CHECKING:
    from pdmd_core.experts import Manifest
    from training.loop.resumption import Resume

_EXAMPLES = """examples:
  python training/distill.py --config training/configs/embedded_demo.yaml
  python training/distill.py --config training/configs/embedded_demo.yaml --output_dir runs/demo --resume
  python training/distill.py --config training/configs/embedded_demo.yaml --output_dir runs/demo --resume \
      --from-checkpoint 40 --allow-change generator.lr generator.lr=5e-4
  python training/distill.py --config training/configs/embedded_demo.yaml plan.steps=[1,1,1,1] generator.lr=2e-4
  python training/distill.py --config training/configs/embedded_demo.yaml --dry-run --gpus 8 --memory-per-gpu 80
  python training/distill.py --config training/configs/embedded_demo.yaml --encode_prompts
  python training/distill.py --output_dir runs/demo --export 80
  python training/distill.py --push_to_hub user/experts --output_dir runs/demo
"""
NEWEST = -1
"""The update of ``--export`` without a number."""
_INSTEAD = ("--dry-run", "--encode_prompts", "--export")
_UNHEARD = {"--resume": _INSTEAD, "--push_to_hub": _INSTEAD}
"""Options of a run to those that are done instead of one."""
_NEEDS = {
    "--from-checkpoint": "--resume",
    "--allow-change": "--resume",
    "--private": "--push_to_hub",
    "--memory-per-gpu": "--dry-run",
    "--gpus": "--dry-run",
}
"""Options that say nothing without another."""


def make_parser() -> arguments.CommandParser:
    """The command line; the epilog has examples and lists every configuration key."""
    rows = [f"  {name} ({default})\n      {description}" for name, default, description in fields_of(DistillConfig)]
    parser = arguments.CommandParser(
        prog="distill.py",
        usage="distill.py --config FILE [options] [key.inner=value ...]\n       "
        "distill.py --push_to_hub ID --output_dir FOLDER [--private]",
        description=__doc__,
        epilog=_EXAMPLES + "\nconfiguration keys (default):\n" + "\n".join(rows),
        takes_others=True,
    )
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--config", type=arguments.path, metavar="FILE", help="YAML file of the run; training/configs/ has examples"
    )
    run.add_argument(
        "--output_dir",
        type=arguments.output_folder,
        metavar="FOLDER",
        help="where to write; replaces output_dir of the config",
    )
    run.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    run.add_argument(
        "--from-checkpoint",
        type=arguments.COUNT,
        metavar="UPDATE",
        help="with --resume: go back to the checkpoint of this update; newer ones are set aside",
    )
    run.add_argument(
        "--allow-change",
        type=arguments.text,
        action="append",
        metavar="KEY",
        help="with --resume: this key of the configuration may differ from the checkpoint's; may be given several "
        "times",
    )
    parts = parser.add_argument_group("instead of a run")
    instead = parts.add_mutually_exclusive_group()
    instead.add_argument(
        "--encode_prompts", action="store_true", help="encode prompts and images, which a run then finds, and end"
    )
    instead.add_argument("--dry-run", action="store_true", help="print what would happen and write nothing")
    instead.add_argument(
        "--export",
        type=arguments.COUNT,
        nargs="?",
        const=NEWEST,
        metavar="UPDATE",
        help="write the experts of this checkpoint, of the newest without a number, into experts-update-N of the "
        "output folder; without --config, as the checkpoint says",
    )
    parts.add_argument(
        "--memory-per-gpu",
        type=arguments.number(0, above=True),
        metavar="GIB",
        help="with --dry-run: fail when the run needs more than this",
    )
    parts.add_argument(
        "--gpus",
        type=arguments.COUNT,
        metavar="N",
        help="with --dry-run: how many GPUs share the run (default: 1)",
    )
    hub = parser.add_argument_group("the Hugging Face Hub")
    hub.add_argument(
        "--push_to_hub",
        type=arguments.text,
        metavar="ID",
        help="upload experts/ to this repository at the end; without --config, those of a finished run",
    )
    hub.add_argument("--private", action="store_true", help="with --push_to_hub: make the repository private")
    return parser


def main(given: list[str] | None = None) -> int:
    """Run the command with these arguments, those of the process when None; returns the exit status."""
    parser = make_parser()
    options, overrides = parser.parse_known_args(given)

    def run() -> int:
        for override in overrides:
            if "=" not in override:
                keys = {name for name, _, _ in fields_of(DistillConfig)}
                key = override.lstrip("-")
                if key in keys:
                    raise UserError(f"{key} is a configuration key: write it as {key}=value")
                if key in MOVED:
                    raise UserError(f"{key} is {MOVED[key]} now, a configuration key: write it as {MOVED[key]}=value")
                raise UserError(f"{parser.unknown(override)} (configuration values are key.inner=value, see --help)")
        refuse_unheard(options, overrides)
        update = None if options.export == NEWEST else options.export
        if options.config is None and options.export is not None:
            return export(options.output_dir, update)
        if options.config is None:
            push(options.output_dir, options.push_to_hub, options.private)
            return 0
        config = load_config(options.config, overrides)
        if options.output_dir is not None:  # as it is, where an override is YAML
            config = config.model_copy(update={"output_dir": options.output_dir})
        if options.dry_run:
            return dry_run(config, options.memory_per_gpu, 1 if options.gpus is None else options.gpus)
        if options.encode_prompts:
            return encode_prompts(config)
        if options.export is not None:
            return export(config.output_dir, update, config)
        resume = None
        if options.resume:
            from training.loop.resumption import Resume

            check_allowed(options.allow_change or [])
            resume = Resume(tuple(options.allow_change or ()), options.from_checkpoint)
        return distill(config, resume, options.push_to_hub, options.private)

    return exit_status(
        "distill.py",
        run,
        "--dry-run with --memory-per-gpu names keys of the section memory with which it fits; go on with --resume",
    )


def refuse_unheard(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Raise UserError for an argument that nothing would come of."""

    def is_given(option: str) -> bool:
        return getattr(options, option.lstrip("-").replace("-", "_")) not in (None, False)

    for option, other in _NEEDS.items():
        if is_given(option) and not is_given(other):
            raise UserError(f"{option} is for {other}: leave it out, or give both")
    for option, others in _UNHEARD.items():
        if is_given(option) and (unheard := [other for other in others if is_given(other)]):
            raise UserError(f"{option} is for a run, {unheard[0]} is not one: leave one of them out")
    if options.config is None:
        if is_given("--export") and is_given("--output_dir") and not overrides:
            return
        if not (is_given("--push_to_hub") and is_given("--output_dir")):
            raise UserError(
                "give --config, or --push_to_hub with the --output_dir of a finished run, or --export with that of any"
            )
        if unheard := [*(["--resume"] if options.resume else []), *overrides]:
            raise UserError(f"{unheard[0]} is for a run, which needs --config: leave it out to push a finished one")


def dry_run(config: DistillConfig, memory_per_gpu: float | None = None, gpus: int = 1) -> int:
    """Print plan, roles, memory, evaluations and outputs."""
    from training.loop.dry_run import describe

    print(describe(config, memory_per_gpu, gpus))
    return 0


def encode_prompts(config: DistillConfig) -> int:
    """Write what a run is conditioned on, without loading a network; any number of processes share the work."""
    from training.data.teacher import TeacherSource, family_of_pipeline, pipeline_on_meta
    from training.data.training_data import training_data
    from training.loop.precision import make_accelerator

    accelerator = make_accelerator("no")
    source = TeacherSource(config.model.path, config.model.revision, config.model.pipeline)
    sizes = pipeline_on_meta(source)
    data = training_data(config, source, family_of_pipeline(sizes), sizes, accelerator.device)
    accelerator.print(f"{len(data.prompts)} examples are encoded in {data.prompts.folder}")
    return 0


def export(run: Path, update: int | None, config: DistillConfig | None = None) -> int:
    """Write the experts of a checkpoint, and say which phases they have."""
    from pdmd_core.experts import read_manifest
    from training.evaluation.distilled import unfinished
    from training.loop.export_checkpoint import export_checkpoint

    folder = export_checkpoint(run, update, config)
    print(f"experts: {folder}")
    if note := unfinished(read_manifest(folder)):
        print(note)
    return 0


def distill(config: DistillConfig, resume: Resume | None, push_to_hub: str | None = None, private: bool = False) -> int:
    """Train, write experts/, push them when asked; returns the exit status."""
    from pdmd_core.experts.hub import check_push
    from training.loop.run_lock import lock_output_dir

    if os.environ.get("RANK", "0") != "0":
        return train(config, resume)
    if push_to_hub:
        check_push(push_to_hub)  # before hours of training, not after
    with lock_output_dir(config.output_dir, resume is not None):
        return train(config, resume, push_to_hub, private)


def train(config: DistillConfig, resume: Resume | None, push_to_hub: str | None = None, private: bool = False) -> int:
    """What each process of a run does, the first one with ``push_to_hub``; returns the exit status."""
    from training.loop.best import StoppedEarly
    from training.loop.build import build_run
    from training.loop.signals import Stopped
    from training.loop.trainer import Trainer

    trainer = Trainer(build_run(config, resume))
    main = trainer.accelerator.is_main_process
    if main:
        if resume and trainer.built.resumption is None:
            print(f"{config.output_dir}: no checkpoint to resume from, starting at update 0")
        print("\n".join([trainer.plan.describe(), *config.remarks()]))
    try:
        experts = trainer.run()
    except (Stopped, StoppedEarly) as stop:
        if main:
            print(f"distill.py: {stop}", file=sys.stderr)
        return stop.exit_status
    if main:
        print(f"experts: {experts}")
    if push_to_hub:
        push(config.output_dir, push_to_hub, private)
    return 0


def push(run: Path, repo_id: str, private: bool) -> None:
    """Upload the experts of a finished run with its last samples and its report. Raises UserError."""
    from pdmd_core.experts import ExpertsError
    from pdmd_core.experts.hub import push_experts

    again = ["python", "training/distill.py", "--push_to_hub", repo_id, "--output_dir", str(run)]
    try:
        add_samples_and_report(run)
        print(f"pushed: {push_experts(run / 'experts', repo_id, private)}")
    except (ExpertsError, OSError) as error:
        command = shlex.join([*again, "--private"] if private else again)
        raise UserError(f"{error}; what was trained stays in {run}. To push again: {command}") from None


def add_samples_and_report(run: Path) -> None:
    """Copy into experts/ what the card shows: the samples of all experts, and what evaluate.py measured of them."""
    from pdmd_core.experts import read_manifest

    experts = run / "experts"
    manifest = read_manifest(experts)
    last = manifest.experts[-1].name
    caption = "The last samples of the training: one prompt a row, one seed a column"
    shown = [(path, path.name, caption) for path in sorted(run.glob(f"samples/{last}-final.*"))]
    for report in (run / "report.json", experts / "report.json"):
        if report.is_file() and is_of_others(report, manifest):
            print(f"{report} was measured with other experts: not pushed, run training/evaluate.py again")
            if report.parent == experts:
                report.unlink()
        elif report.is_file() and report.parent == run:
            shutil.copy(report, experts)
            caption = "Same prompts and seeds: the teacher, the teacher in few steps, the experts"
            shown += [(path, "comparison.png", caption) for path in run.glob("report.png")]
    for path, name, caption in shown:
        (experts / "samples").mkdir(exist_ok=True)
        shutil.copy(path, experts / "samples" / name)
        (experts / "samples" / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")


def is_of_others(report: Path, manifest: Manifest) -> bool:
    """Whether a report says that it measured other experts; one that says nothing of it is taken as it is."""
    try:
        measured = json.loads(report.read_text(encoding="utf-8"))["experts"].values()
    except (ValueError, KeyError, TypeError, AttributeError):  # of an earlier version, or none: the card says so
        return False
    return {expert.name: expert.sha256 for expert in manifest.experts} not in list(measured)


if __name__ == "__main__":
    sys.exit(main())

"""Distil a diffusion model into few-step phase experts.

    python training/distill.py --config training/configs/embedded_demo.yaml
    python training/distill.py --config training/configs/embedded_demo.yaml plan.steps=[1,1,1,1] generator.lr=2e-4
    python training/distill.py --config training/configs/embedded_demo.yaml --dry-run

Overrides are ``key.inner=value`` after the options. A run that was stopped goes on with --resume.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on shared cores
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.command_line import exit_status
from training.config import DistillConfig, fields_of, load_config


def make_parser() -> argparse.ArgumentParser:
    """The command line; the epilog lists every configuration key."""
    rows = [f"  {name} ({default})\n      {description}" for name, default, description in fields_of(DistillConfig)]
    parser = argparse.ArgumentParser(
        prog="distill.py",
        description=__doc__,
        epilog="configuration keys (default):\n" + "\n".join(rows),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file; training/configs/ has examples")
    parser.add_argument("--output_dir", type=Path, help="where to write; replaces output_dir of the config")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument("--dry-run", action="store_true", help="print what would happen and write nothing")
    parser.add_argument("--push_to_hub", metavar="ID", help="upload experts/ to this Hub repository at the end")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace configuration values")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = [*options.overrides, *rest]
    if options.output_dir:
        overrides.append(f"output_dir={options.output_dir}")

    def run() -> int:
        config = load_config(options.config, overrides)
        return dry_run(config) if options.dry_run else distill(config, options.resume, options.push_to_hub)

    return exit_status("distill.py", run)


def dry_run(config: DistillConfig) -> int:
    """Print plan, roles, memory, evaluations and outputs."""
    from training.dry_run import describe

    print(describe(config))
    return 0


def distill(config: DistillConfig, resume: bool, push_to_hub: str | None) -> int:
    """Train, write experts/, push them when asked."""
    from pdmd_core.experts.hub import push_experts
    from training.trainer import Trainer

    trainer = Trainer(config)
    if trainer.accelerator.is_main_process:
        print(trainer.plan.describe())
    try:
        experts = trainer.run(resume)
    except KeyboardInterrupt:
        print(f"distill.py: stopped; --resume goes on from the last checkpoint in {config.output_dir}", file=sys.stderr)
        return 130
    if trainer.accelerator.is_main_process:
        print(f"experts: {experts}")
        if push_to_hub:
            print(f"pushed: {push_experts(experts, push_to_hub)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

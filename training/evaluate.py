"""Compare phase experts with their teacher: quality, diversity, prompt agreement, motion, time, pictures.

The first method is the teacher in many steps. It is measured against other samples of itself, so its row says how small
a distance can be (the noise floor); then comes the teacher in as few steps as the experts, then each folder of experts.
All of them sample the same prompts with the same seeds. Written are report.md and report.json (every number with its
95 % interval) and pictures: report.png, and report/ with all seeds of a prompt; GIFs too for clips.

Everything that is computed is kept in the cache folder: a run that was stopped goes on where it was, and more seeds,
prompts, experts or metrics only cost what is new.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pdmd_core import arguments
from training.evaluation.machine import add_machine_options

DEFAULT_PROMPTS = Path(__file__).resolve().parent / "prompts" / "embedded_eval.txt"
_EXAMPLES = """examples:
  python training/evaluate.py --experts runs/demo/experts --output_dir runs/demo
  python training/evaluate.py --experts phased=runs/a/experts sgts=runs/b/experts --output_dir runs/compared \\
      --teacher Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts prompts.txt --seeds 8 --dtype bfloat16
  python training/evaluate.py --experts runs/demo/experts --output_dir runs/demo --metrics frechet coverage
  python training/evaluate.py --experts runs/demo/experts --output_dir runs/demo --no_sampling
"""


def make_parser() -> arguments.CommandParser:
    """The command line; the epilog has examples and lists the metrics."""
    from pdmd_core.experts.format.manifest import MAX_STRENGTH
    from training.evaluation.comparison import METRICS
    from training.evaluation.measures import FEATURE_SPACES
    from training.evaluation.methods import REFERENCE_SEED
    from training.evaluation.request import TEACHER_STEPS

    metrics = "\n".join(f"  {name:14}{metric.text}" for name, metric in METRICS.items())
    parser = arguments.CommandParser(
        prog="evaluate.py",
        description=__doc__,
        epilog=f"{_EXAMPLES}\nmetrics (docs/evaluation.md says what they mean):\n{metrics}",
    )
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--experts",
        type=arguments.text,
        nargs="+",
        required=True,
        metavar="[NAME=]FOLDER",
        help="experts folders of distillations",
    )
    what.add_argument(
        "--output_dir", type=arguments.output_folder, required=True, metavar="FOLDER", help="where the report goes"
    )
    what.add_argument(
        "--teacher",
        type=arguments.text,
        metavar="FOLDER_OR_ID",
        help="diffusers pipeline, folder or Hub id (default: the base of the first experts)",
    )
    what.add_argument(
        "--pipeline",
        type=arguments.text,
        metavar="CLASS",
        help="diffusers class, if not the one that the teacher names",
    )
    what.add_argument(
        "--prompts",
        type=arguments.text,
        metavar="FILE",
        default=str(DEFAULT_PROMPTS),
        help="a prompt a line; .jsonl with a prompt and an image a line; a table, a dataset's folder or its Hub id "
        f"(default: {DEFAULT_PROMPTS.name})",
    )
    what.add_argument(
        "--seeds",
        type=arguments.whole_number(1, REFERENCE_SEED),
        metavar="N",
        default=10,
        help="samples of each prompt (default: 10)",
    )
    what.add_argument(
        "--few_steps",
        type=arguments.COUNT,
        metavar="N",
        nargs="*",
        help="rows of the teacher in these steps (default: the experts')",
    )
    what.add_argument(
        "--quantization",
        choices=("int8", "float8", "nf4"),
        nargs="+",
        default=[],
        help="further rows: LoRA experts on a base whose matrices have 8 bits, or 4, as many will run them",
    )
    what.add_argument(
        "--strengths",
        type=arguments.number(-MAX_STRENGTH),
        metavar="S",
        nargs="+",
        default=[],
        help="further rows: LoRA experts at these strengths; below 1 takes back what a long training overshoots. "
        "`phased-dmd strength` sets the one to keep",
    )
    what.add_argument("--no_noise_floor", action="store_true", help="leave out the row of the teacher in many steps")
    what.add_argument(
        "--data", type=arguments.path, metavar="FOLDER", help="real pictures or clips, for the metric data_frechet"
    )

    how = parser.add_argument_group("how it is measured")
    how.add_argument(
        "--metrics", type=arguments.text, nargs="+", metavar="NAME", help="see below (default: all that apply)"
    )
    how.add_argument(
        "--features",
        nargs="+",
        choices=FEATURE_SPACES,
        help="networks to measure in (default: emoji if the prompts are the embedded teacher's, otherwise efflite0; "
        "and dinov3 with its weights)",
    )
    how.add_argument(
        "--dino_weights", type=arguments.path, metavar="FOLDER", help="a DINOv3 model in the format of transformers"
    )
    how.add_argument(
        "--lpips_weights",
        type=arguments.path,
        nargs=2,
        metavar=("BACKBONE", "HEADS"),
        help="alexnet-owt-7be5be79.pth of torchvision, alex.pth of lpips 0.1",
    )
    how.add_argument(
        "--image_reward",
        type=arguments.path,
        metavar="FOLDER",
        help="ImageReward.pt of zai-org/ImageReward beside vocab.txt of google-bert/bert-base-uncased",
    )

    sampling = parser.add_argument_group("how the teacher samples (default: as it was distilled)")
    sampling.add_argument(
        "--teacher_steps", type=arguments.COUNT, metavar="N", help=f"steps of the reference (default: {TEACHER_STEPS})"
    )
    sampling.add_argument("--shift", type=arguments.number(0, above=True), help="shift of the teacher's steps")
    sampling.add_argument(
        "--guidance_scale",
        type=arguments.number(0),
        metavar="SCALE",
        help="classifier-free guidance of the teacher; 1 is none",
    )
    sampling.add_argument("--negative_prompt", metavar="PROMPT", help="what guidance moves away from")

    size = parser.add_argument_group("size of all samples (default: as distilled)")
    size.add_argument("--height", type=arguments.LENGTH, metavar="PIXELS", help="height of a sample")
    size.add_argument("--width", type=arguments.LENGTH, metavar="PIXELS", help="width of a sample")
    size.add_argument("--frames", type=arguments.LENGTH, metavar="N", help="frames of a clip, 1 for a picture")
    size.add_argument(
        "--max_sequence_length", type=arguments.LENGTH, metavar="TOKENS", help="tokens to which prompts are padded"
    )

    machine = parser.add_argument_group("machine, cache and pictures")
    add_machine_options(machine)
    machine.add_argument(
        "--cache_dir",
        type=arguments.output_folder,
        metavar="FOLDER",
        help="what is kept; share it between reports (default: OUTPUT_DIR/cache)",
    )
    machine.add_argument(
        "--no_sampling",
        action="store_true",
        help="write the report from the samples in the cache, and end when one is missing",
    )
    machine.add_argument(
        "--shown_prompts", type=arguments.COUNT, metavar="N", default=8, help="prompts in the pictures (default: 8)"
    )
    machine.add_argument(
        "--vbench",
        type=arguments.output_folder,
        metavar="FOLDER",
        help="write all clips there as VBench reads them, a folder a method: PROMPT-INDEX.mp4",
    )
    machine.add_argument(
        "--frame_rate",
        type=arguments.number(0, above=True),
        metavar="N",
        help="frames a second of these clips (default: the model's)",
    )
    return parser


def main(given: list[str] | None = None) -> int:
    """Run the command with these arguments, those of the process when None; returns the exit status."""
    options = make_parser().parse_args(given)
    from training.config.command_line import SHORT_OF_MEMORY, exit_status

    return exit_status("evaluate.py", lambda: run(options), SHORT_OF_MEMORY)


def run(options: object) -> int:
    """Write the report and print it."""
    from training.evaluation.request import Request
    from training.evaluation.run import write_report

    request = Request(**vars(options))
    report = write_report(request)
    print(report.read_text(encoding="utf-8"))
    print(f"report: {report} (picture: {report.with_suffix('.png')})")
    if request.vbench is not None:
        print(f"clips for VBench: {request.vbench}, a folder a method. For example:")
        print("  vbench evaluate --mode custom_input --dimension motion_smoothness --videos_path FOLDER/METHOD")
    return 0


if __name__ == "__main__":
    sys.exit(main())

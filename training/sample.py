"""Sample phase experts, or a teacher alone, into a picture: rows are prompts, columns are seeds.

Clips are written as a filmstrip (PNG) and an animation (GIF) beside it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pdmd_core import arguments
from training.evaluation.machine import add_machine_options

if TYPE_CHECKING:
    from pdmd_core.experts import PhasedExperts
    from pdmd_core.phases import PhasePlan
    from training.data.examples import Example

_EXAMPLES = """examples:
  python training/sample.py --experts runs/demo/experts --prompt "a panda on a blue background" --seeds 0 1 2 3
  python training/sample.py --experts runs/demo/experts --prompts prompts.txt --steps 8 --output more_steps.png
  python training/sample.py --teacher training/embedded/models/teacher --steps 40 --guidance_scale 4 --prompts p.txt
  python training/sample.py --experts runs/i2v/experts --prompt "a boat sails away" --image boat.jpg --dtype bfloat16
"""
_TEACHER_STEPS, _SHIFT, _GUIDANCE = 40, 3.0, 4.0


def make_parser() -> arguments.CommandParser:
    """The command line."""
    parser = arguments.CommandParser(prog="sample.py", description=__doc__, epilog=_EXAMPLES)
    what = parser.add_argument_group("what samples")
    what.add_argument(
        "--experts", type=arguments.path, metavar="FOLDER", help="experts folder; without it the teacher samples alone"
    )
    what.add_argument(
        "--teacher",
        type=arguments.text,
        metavar="FOLDER_OR_ID",
        help="diffusers pipeline, folder or Hub id (default: the base that the experts name)",
    )
    what.add_argument(
        "--pipeline",
        type=arguments.text,
        metavar="CLASS",
        help="diffusers class, if not the one that the teacher names",
    )

    of_what = parser.add_argument_group("of what")
    of_what.add_argument(
        "--prompt", type=arguments.text, action="append", default=[], help="a prompt; may be given several times"
    )
    of_what.add_argument(
        "--prompts",
        type=arguments.text,
        metavar="FILE",
        help="a prompt a line; .jsonl with a prompt and an image a line; a table, a dataset's folder or its Hub id",
    )
    of_what.add_argument(
        "--image",
        type=arguments.path,
        action="append",
        default=[],
        help="for teachers that take one: one for each --prompt in their order, or one for all of them",
    )
    of_what.add_argument(
        "--last-image",
        type=arguments.path,
        action="append",
        default=[],
        help="with which clips end, for teachers that take it: as --image",
    )
    of_what.add_argument(
        "--seeds",
        type=arguments.SEED,
        nargs="+",
        default=[0, 1, 2, 3],
        metavar="SEED",
        help="one sample of each prompt for each (default: 0 1 2 3)",
    )

    size = parser.add_argument_group("size (default: as the experts were distilled; 64x64 pixels for a teacher alone)")
    size.add_argument("--height", type=arguments.LENGTH, metavar="PIXELS", help="height of a sample")
    size.add_argument("--width", type=arguments.LENGTH, metavar="PIXELS", help="width of a sample")
    size.add_argument("--frames", type=arguments.LENGTH, metavar="N", help="frames of a clip, 1 for a picture")
    size.add_argument(
        "--max_sequence_length",
        type=arguments.LENGTH,
        metavar="TOKENS",
        help="tokens to which prompts are padded (default for a teacher alone: 512)",
    )

    how = parser.add_argument_group("how")
    how.add_argument(
        "--steps",
        type=arguments.COUNT,
        metavar="N",
        help="of a teacher alone (default: 40); of experts at least those of their plan, which all stay: further ones "
        "are put between them (default: the plan)",
    )
    how.add_argument(
        "--shift",
        type=arguments.number(0, above=True),
        help=f"of a teacher alone: shift of its steps (default: {_SHIFT:g})",
    )
    how.add_argument(
        "--guidance_scale",
        type=arguments.number(0),
        metavar="SCALE",
        help=f"of a teacher alone: classifier-free guidance, 1 is none (default: {_GUIDANCE:g})",
    )
    how.add_argument(
        "--negative_prompt", metavar="PROMPT", help="of a teacher alone: what guidance moves away from (default: '')"
    )

    machine = parser.add_argument_group("machine and output")
    add_machine_options(machine)
    machine.add_argument(
        "--quantization",
        choices=("none", "int8", "float8", "nf4"),
        default="none",
        help="matrices of the teacher, which is the base of LoRA experts, in 8 bits (takes the package torchao) or 4 "
        "(bitsandbytes) (default: none)",
    )
    machine.add_argument(
        "--output",
        type=arguments.output_file(".png"),
        default=Path("samples.png"),
        metavar="FILE.png",
        help="where to write (default: samples.png)",
    )
    return parser


def main(given: list[str] | None = None) -> int:
    """Run the command with these arguments, those of the process when None; returns the exit status."""
    options = make_parser().parse_args(given)
    from training.config.command_line import SHORT_OF_MEMORY, exit_status

    return exit_status("sample.py", lambda: run(options), SHORT_OF_MEMORY)


def run(options: argparse.Namespace) -> int:
    """Sample and write; what is wrong is said before any network is loaded."""
    import tempfile

    import torch

    from pdmd_core.experts.verify import check_files
    from pdmd_core.phases import PhasePlan
    from training.config.command_line import UserError
    from training.data.examples import PromptError, read_examples
    from training.evaluation.distilled import GivenSize, open_experts, teacher_source
    from training.evaluation.pictures import save_samples
    from training.evaluation.sampler import Sampler

    experts = open_experts(options.experts) if options.experts is not None else None
    refuse_unheard(options)
    refuse_quantized(options, experts)
    examples = given_examples(options.prompt, options.image, options.last_image)
    examples += read_examples(options.prompts) if options.prompts is not None else []
    if not examples:
        raise PromptError("nothing to sample: give --prompt or --prompts")
    source = teacher_source(experts, options.teacher, options.pipeline)
    size = GivenSize(options.width, options.height, options.frames, options.max_sequence_length)
    sample_size = size.complete({"experts": experts} if experts else {})
    steps = _TEACHER_STEPS if options.steps is None else options.steps
    shift = _SHIFT if options.shift is None else options.shift
    if experts:
        plan = plan_of(experts, options.steps)
        check_files(experts)
    else:
        PhasePlan.from_steps([steps], shift)
    pairs = [(prompt, seed) for prompt in range(len(examples)) for seed in options.seeds]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:  # prompts are read as they are needed
        sampler = Sampler(
            source.path,
            sample_size,
            examples,
            Path(cache),
            experts,
            options.batch_size,
            options.device,
            source.pipeline,
            getattr(torch, options.dtype),
            options.negative_prompt or "",
            source.revision,
            options.quantization,
            offload=options.offload,
            decoding=options.decode,
        )
        if experts:
            latents = sampler.with_experts(pairs, plan=plan)
        else:
            guidance = _GUIDANCE if options.guidance_scale is None else options.guidance_scale
            latents = sampler.with_teacher(pairs, steps, shift, guidance)
    if not bool(latents.isfinite().all()):
        raise UserError("the samples have values that are not finite: use another --dtype, or less guidance")
    for path in save_samples(options.output, sampler.decode(latents), columns=len(options.seeds)):
        print(path)
    return 0


def refuse_unheard(options: argparse.Namespace) -> None:
    """Raise UserError for an option that nothing would come of."""
    from training.config.command_line import UserError

    if options.experts is not None:
        for name in ("shift", "guidance_scale", "negative_prompt"):
            if getattr(options, name) is not None:
                raise UserError(
                    f"--{name} is for a teacher alone: experts walk the sigmas of their plan without guidance; leave "
                    "it out, or leave out --experts"
                )
    elif options.negative_prompt is not None and options.guidance_scale == 1:
        raise UserError("--negative_prompt is for guidance, and --guidance_scale 1 is none: leave one of them out")


def refuse_quantized(options: argparse.Namespace, experts: PhasedExperts | None) -> None:
    """Raise UserError where the base cannot be quantized, or the package for it is missing."""
    if options.quantization == "none":
        return
    from training.config.command_line import UserError
    from training.memory.quantization import library_config

    if experts is not None and any(expert.kind != "lora" for expert in experts.manifest.experts):
        raise UserError("--quantization is of the base of LoRA experts, these are full networks: leave it out")
    if options.offload == "blocks":
        raise UserError("--offload blocks is for plain weights: leave it out, or --quantization")
    library_config(options.quantization)


def plan_of(experts: PhasedExperts, steps: int | None) -> PhasePlan:
    """The plan of experts, refined to so many steps when given, with a note on standard error about further ones.

    Raises PhasePlanError for fewer steps than were trained.
    """
    trained = experts.manifest.plan
    if steps is None or steps == len(trained.sigmas):
        return trained
    plan = trained.refined(steps)
    own = len(trained.sigmas)
    print(
        f"sample.py: these experts were trained on {own} sigmas, the other {steps - own} of the {steps} steps lie "
        "between them: compare with a sample of the plan's own steps",
        file=sys.stderr,
    )
    return plan


def given_examples(prompts: list[str], images: list[Path], last_images: list[Path]) -> list[Example]:
    """Prompts with their images. Raises PromptError when it is not clear which belongs to which."""
    from training.data.examples import Example

    first, last = (
        _each(option, given, len(prompts)) for option, given in (("--image", images), ("--last-image", last_images))
    )
    return [Example(prompt, a, last_image=b) for prompt, a, b in zip(prompts, first, last, strict=True)]


def _each(option: str, images: list[Path], prompts: int) -> list[Path] | list[None]:
    """An image for each prompt, or none at all."""
    from training.data.examples import PromptError

    if len(images) not in (0, 1, prompts) or (images and not prompts):
        raise PromptError(
            f"{option}: expected one for each --prompt ({prompts}) or one for all of them, found {len(images)}"
        )
    missing = [image for image in images if not image.is_file()]
    if missing:
        raise PromptError(f"{option}: there is no image {missing[0]}")
    if not images:
        return [None] * prompts
    return images * prompts if len(images) == 1 else images


if __name__ == "__main__":
    sys.exit(main())

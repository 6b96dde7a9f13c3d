"""Sample phase experts, or their teacher, into a picture.

    python training/sample.py --experts runs/demo/experts --prompt "a panda on a blue background" --seeds 0 1 2 3
    python training/sample.py --teacher training/embedded/models/teacher --steps 40 --guidance_scale 4 --prompts p.txt
    python training/sample.py --experts runs/i2v/experts --prompt "a boat sails away" --image boat.jpg --dtype bfloat16

Rows are prompts, columns are seeds. Clips are written as a filmstrip (PNG) and an animation (GIF).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from training.data.examples import Example


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=Path, help="experts folder; without it the teacher samples")
    parser.add_argument("--teacher", help="diffusers pipeline; the base named by the experts when left out")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    parser.add_argument("--prompts", type=Path, help="a prompt a line; or .jsonl with a prompt and an image a line")
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        help="for teachers that take one: one for each --prompt in their order, or one for all of them",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="one sample for each (default: 0..3)"
    )
    parser.add_argument("--steps", type=int, default=40, help="steps of the teacher (default: 40)")
    parser.add_argument("--shift", type=float, default=3.0, help="shift of the teacher's steps (default: 3)")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="guidance of the teacher (default: 4)")
    parser.add_argument("--negative_prompt", default="", help="what the teacher's guidance moves away from")
    parser.add_argument("--pipeline", help="diffusers class, if not the one that the teacher names")
    parser.add_argument("--height", type=int, help="pixels (default: as distilled)")
    parser.add_argument("--width", type=int, help="pixels (default: as distilled)")
    parser.add_argument("--frames", type=int, help="frames (default: as distilled)")
    parser.add_argument("--max_sequence_length", type=int, help="prompt padding (default: as distilled)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu ... (default: a GPU if there is one)")
    parser.add_argument("--batch_size", type=int, help="samples at once (default: 1 for large samples, up to 64)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the networks (default: float32; large teachers take bfloat16)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("samples.png"), help="where to write (default: samples.png)"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    options = make_parser().parse_args(arguments)
    from training.config.command_line import exit_status

    return exit_status("sample.py", lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Sample and write."""
    import tempfile

    import torch

    from pdmd_core.experts import PhasedExperts
    from pdmd_core.phases import PhasePlan
    from training.data.buckets import SampleSize
    from training.data.examples import PromptError, read_examples
    from training.evaluation.pictures import save_samples
    from training.evaluation.sampler import Sampler

    experts = PhasedExperts.open(options.experts) if options.experts else None
    examples = given_examples(options.prompt, options.image)
    examples += read_examples(options.prompts) if options.prompts else []
    if not examples:
        raise PromptError("nothing to sample: give --prompt or --prompts")
    teacher = options.teacher or (experts.manifest.base.model if experts else None)
    if teacher is None:
        raise PromptError("nothing to sample with: give --experts or --teacher")
    if experts:  # what is wrong is said before the encoders are loaded
        for expert in experts.manifest.experts:
            experts.verify(expert.name)
    else:
        PhasePlan.from_steps([options.steps], options.shift)
    training = experts.manifest.training if experts else {}
    width, height, frames = training.get("size", (64, 64, 1))
    size = SampleSize(
        options.height or height,
        options.width or width,
        options.frames or frames,
        options.max_sequence_length or training.get("max_sequence_length", 512),
    )
    pairs = [(prompt, seed) for prompt in range(len(examples)) for seed in options.seeds]
    pipeline = options.pipeline or training.get("pipeline")
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:  # prompts are read as they are needed
        sampler = Sampler(
            teacher,
            size,
            examples,
            Path(cache),
            experts,
            options.batch_size,
            options.device,
            pipeline,
            dtype,
            options.negative_prompt,
        )
        if experts:
            latents = sampler.with_experts(pairs)
        else:
            latents = sampler.with_teacher(pairs, options.steps, options.shift, options.guidance_scale)
    for path in save_samples(options.output, sampler.decode(latents), columns=len(options.seeds)):
        print(path)
    return 0


def given_examples(prompts: list[str], images: list[Path]) -> list[Example]:
    """Prompts with their images. Raises PromptError when it is not clear which belongs to which."""
    from training.data.examples import Example, PromptError

    if len(images) not in (0, 1, len(prompts)) or (images and not prompts):
        raise PromptError(
            f"--image: expected one for each --prompt ({len(prompts)}) or one for all of them, found {len(images)}"
        )
    missing = [image for image in images if not image.is_file()]
    if missing:
        raise PromptError(f"--image: there is no image {missing[0]}")
    each: list[Path | None] = [*images] * (len(prompts) if len(images) == 1 else 1)
    return [Example(prompt, image) for prompt, image in zip(prompts, each or [None] * len(prompts), strict=True)]


if __name__ == "__main__":
    sys.exit(main())

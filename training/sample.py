"""Sample phase experts, or their teacher, into a picture.

    python training/sample.py --experts runs/demo/experts --prompt "a panda on a blue background" --seeds 0 1 2 3
    python training/sample.py --teacher training/embedded/models/teacher --steps 40 --guidance_scale 4 --prompts p.txt

Rows are prompts, columns are seeds. Clips are written as a filmstrip (PNG) and an animation (GIF).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=Path, help="experts folder; without it the teacher samples")
    parser.add_argument("--teacher", help="diffusers pipeline; the base named by the experts when left out")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    parser.add_argument("--prompts", type=Path, help="text file, one prompt a line")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="one sample for each (default: 0..3)"
    )
    parser.add_argument("--steps", type=int, default=40, help="steps of the teacher (default: 40)")
    parser.add_argument("--shift", type=float, default=3.0, help="shift of the teacher's steps (default: 3)")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="guidance of the teacher (default: 4)")
    parser.add_argument("--height", type=int, help="pixels (default: as distilled)")
    parser.add_argument("--width", type=int, help="pixels (default: as distilled)")
    parser.add_argument("--frames", type=int, help="frames (default: as distilled)")
    parser.add_argument("--max_sequence_length", type=int, help="prompt padding (default: as distilled)")
    parser.add_argument(
        "--output", type=Path, default=Path("samples.png"), help="where to write (default: samples.png)"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    options = make_parser().parse_args(arguments)
    from training.command_line import exit_status

    return exit_status("sample.py", lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Sample and write."""
    import tempfile

    from pdmd_core.experts import PhasedExperts
    from training.pictures import save_samples
    from training.prompts import PromptError, read_prompts
    from training.sampler import Sampler, SampleSize

    experts = PhasedExperts.open(options.experts) if options.experts else None
    prompts = options.prompt + (read_prompts(options.prompts) if options.prompts else [])
    if not prompts:
        raise PromptError("nothing to sample: give --prompt or --prompts")
    teacher = options.teacher or (experts.manifest.base.model if experts else None)
    if teacher is None:
        raise PromptError("nothing to sample with: give --experts or --teacher")
    training = experts.manifest.training if experts else {}
    width, height, frames = training.get("size", (64, 64, 1))
    size = SampleSize(
        options.height or height,
        options.width or width,
        options.frames or frames,
        options.max_sequence_length or training.get("max_sequence_length", 512),
    )
    pairs = [(prompt, seed) for prompt in range(len(prompts)) for seed in options.seeds]
    with tempfile.TemporaryDirectory() as cache:
        sampler = Sampler(teacher, size, prompts, Path(cache), experts)
    if experts:
        latents = sampler.with_experts(pairs)
    else:
        latents = sampler.with_teacher(pairs, options.steps, options.shift, options.guidance_scale)
    for path in save_samples(options.output, sampler.decode(latents), columns=len(options.seeds)):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

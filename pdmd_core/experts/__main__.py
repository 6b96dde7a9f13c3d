"""``phased-dmd``: look at expert files, check them, and convert them for other tools."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from .. import __version__, arguments
from ..phases import PhasePlan, PhasePlanError
from ..presets import find_preset, list_presets
from .errors import ExpertsError

_EXAMPLES = """examples:
  phased-dmd inspect experts                      what these experts are; also any single .safetensors file
  phased-dmd verify experts --sample              whole, fitting their base, sampling the same in stock diffusers
  phased-dmd convert experts --to full --output full_experts
  phased-dmd convert full_experts --to lora --rank 32 --output lora_experts
  phased-dmd convert experts --to diffusers --output pipeline
  phased-dmd convert experts --to comfyui --dtype bfloat16 --output ComfyUI/models/diffusion_models/my_experts
  phased-dmd convert some_lora.safetensors --layout diffusers --output for_diffusers.safetensors
  phased-dmd strength experts 0.8                 use LoRA experts at this strength from now on
  phased-dmd plan --list                          steps, shift and guidance of released few-step files

exit status: 0 when all is well, 1 for a failed check, 2 for wrong arguments or files (one line on standard error)
"""
_INSPECT = """examples:
  phased-dmd inspect experts
  phased-dmd inspect experts/low_noise.safetensors
  phased-dmd inspect some_lora.safetensors --json
"""
_VERIFY = """examples:
  phased-dmd verify experts
  phased-dmd verify experts --base models/Wan2.1-T2V-1.3B-Diffusers
  phased-dmd verify experts --sample --size 832x480x81 --prompt "a panda on a blue background"
"""
_CONVERT = """what --to writes:
  full        an experts folder of full experts; LoRA experts are merged into their base, in float32
  lora        an experts folder of LoRA experts of --rank, by SVD of the difference to the base; the error is printed
  diffusers   a stock pipeline folder: the base with the experts as transformer and transformer_2
  comfyui     one file for each expert under the original names of all weights, for ComfyUI's Load Diffusion Model

what --layout writes, of a folder of LoRA experts or of anyone's LoRA file; what has no place there is listed:
  native      original names, lora_down, lora_up and alpha: ComfyUI reads it, and diffusers for most models
  kohya       original names with underscores for dots: ComfyUI, and diffusers for some models
  diffusers   diffusers' names for its load_lora_weights; alpha is in the weights
  peft        a folder for PEFT's PeftModel: diffusers' names, alpha in adapter_config.json

LoRA files of an experts folder load in ComfyUI and diffusers as they are. Weights are handled one at a time.

examples:
  phased-dmd convert experts --to full --output full_experts
  phased-dmd convert full_experts --to lora --rank 32 --output lora_experts
  phased-dmd convert a14b_experts --to lora --rank 128 --network transformer --output on_one_network
  phased-dmd convert experts_of_a_fine_tune --to lora --rank 64 --relative-to Wan-AI/Wan2.1-T2V-14B-Diffusers --output x
  phased-dmd convert experts --to comfyui --dtype bfloat16 --output ComfyUI/models/diffusion_models/my_experts
"""
_STRENGTH = """examples:
  phased-dmd strength experts 0.8
  phased-dmd strength experts high_noise=0.8 low_noise=0.9
  phased-dmd strength experts 1                   as they were trained

Only the manifest and a generated README.md are written, the weights stay as they are. All that opens the folder
follows: pipelines, nodes, sample.py, evaluate.py and further training. The README.md tells it to loaders of LoRA files.
Which strength: python training/evaluate.py --experts experts --output_dir report --strengths 0.7 0.8 0.9
"""
_PLAN = """examples:
  phased-dmd plan --list
  phased-dmd plan wan2.2-lightx2v-4step
"""


def make_parser() -> arguments.CommandParser:
    """Make the parser of the command line.

    Returns:
        The parser, with one subcommand for each thing to do.
    """
    parser = arguments.CommandParser(prog="phased-dmd", description=__doc__, epilog=_EXAMPLES)
    parser.add_argument("--version", action="version", version=f"phased-dmd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = _add_command(commands, "inspect", "say what a folder or file is, from its headers alone", _INSPECT)
    inspect.add_argument(
        "path", type=arguments.path, help="experts folder, or any .safetensors file (LoRAs of others too)"
    )
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)

    verify = _add_command(
        commands, "verify", "check hashes, fit to the base, values, and with --sample the result", _VERIFY
    )
    verify.add_argument("folder", type=arguments.path, help="experts folder")
    _add_base(verify)
    sample = verify.add_argument_group("sampling once here and once in stock diffusers")
    sample.add_argument("--sample", action="store_true", help="sample both ways and compare the pixels")
    sample.add_argument("--prompt", type=arguments.text, help="what to sample (default: a panda on a blue background)")
    sample.add_argument("--size", type=_size, metavar="WIDTHxHEIGHT[xFRAMES]", help="in pixels (default: as distilled)")
    sample.add_argument(
        "--max_sequence_length",
        type=arguments.LENGTH,
        metavar="TOKENS",
        help="tokens to which the prompt is padded (default: as distilled)",
    )
    sample.add_argument("--device", type=arguments.text, help="cuda, cpu ... (default: a GPU if there is one)")
    sample.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of the networks (default: float32, which finds more)"
    )
    sample.add_argument(
        "--offload", action="store_true", default=None, help="what does not run waits in host memory (with a GPU)"
    )
    verify.set_defaults(run=_verify)

    convert = _add_command(commands, "convert", "write the experts for other tools, or between LoRA and full", _CONVERT)
    convert.add_argument("source", type=arguments.path, help="experts folder; for --layout also any LoRA file")
    target = convert.add_mutually_exclusive_group(required=True)
    target.add_argument("--to", choices=["comfyui", "diffusers", "full", "lora"], help="see below")
    target.add_argument("--layout", choices=["diffusers", "kohya", "native", "peft"], help="see below")
    convert.add_argument(
        "--output",
        type=arguments.output_folder,
        required=True,
        help="folder to write, for a LoRA file the file; it appears complete or not at all",
    )
    convert.add_argument(
        "--family", type=arguments.text, help="model family of a LoRA file whose keys do not tell it; for --layout"
    )
    _add_base(convert)
    convert.add_argument(
        "--relative-to",
        type=arguments.text,
        metavar="FOLDER_OR_ID",
        help="another pipeline, of networks of the same shape, that the LoRA experts are for; for --to lora",
    )
    convert.add_argument(
        "--network",
        type=arguments.text,
        help="the one network that all LoRA experts are for, such as transformer of a base with two; for --to lora",
    )
    convert.add_argument("--rank", type=arguments.COUNT, help="rank of the LoRA experts; for --to lora")
    convert.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="how weights are stored (default: as in the files)"
    )
    convert.add_argument("--overwrite", action="store_true", help="replace --output, once the new one is complete")
    convert.set_defaults(run=_convert)

    strength = _add_command(commands, "strength", "set the strength of LoRA experts in their manifest", _STRENGTH)
    strength.add_argument("folder", type=arguments.path, help="experts folder")
    strength.add_argument(
        "strength", nargs="+", type=_strength, metavar="[NAME=]S", help="the factor, of all experts or of one"
    )
    strength.set_defaults(run=_set_strength)

    plan = _add_command(commands, "plan", "show the plan of well-known few-step files and models", _PLAN)
    plan.add_argument("name", nargs="?", help="name of a preset")
    plan.add_argument("--list", action="store_true", help="list all presets")
    plan.set_defaults(run=_plan)
    return parser


def _add_command(commands: Any, name: str, what: str, epilog: str) -> arguments.CommandParser:
    parser: arguments.CommandParser = commands.add_parser(
        name, help=what, description=what[0].upper() + what[1:] + ".", epilog=epilog
    )
    return parser


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", type=arguments.text, help="folder or Hub id of the base pipeline (default: the one the experts name)"
    )


def _size(given: str) -> tuple[int, int, int]:
    try:
        numbers = [int(part) for part in given.lower().split("x")]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 3) or min(numbers) < 1:
        raise argparse.ArgumentTypeError(
            f"expected WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES, such as 832x480x81, found {given!r}"
        )
    width, height, frames = [*numbers, 1][:3]
    return width, height, frames


def _strength(given: str) -> tuple[str, float]:
    name, _, value = given.rpartition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, or NAME= and a number, found {given!r}") from None


def main(arguments: list[str] | None = None) -> int:
    """Run the command ``phased-dmd``.

    Args:
        arguments: The arguments of the command line; None takes those of the process.

    Returns:
        The exit status: 0 when all is well, 1 for a failed check, 2 for wrong arguments or files.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    run: Callable[[argparse.ArgumentParser, argparse.Namespace], int] = options.run
    try:
        return run(parser, options)
    except (ExpertsError, PhasePlanError) as error:
        print(f"phased-dmd: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f'phased-dmd: {error.name} is needed for this: pip install "phased-dmd[diffusers]"', file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough, as in `phased-dmd inspect x | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"phased-dmd: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("phased-dmd: stopped, nothing was changed", file=sys.stderr)
        return 130


def _inspect(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from .inspect import inspect, report_text

    report = inspect(options.path)
    print(json.dumps(report, indent=2) if options.json else report_text(report))
    return 0


_OF_SAMPLE = ("prompt", "size", "max_sequence_length", "device", "dtype", "offload")


def _verify(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    import torch

    from .verify import SampleRequest, verify

    request = None
    if options.sample:
        prompt = SampleRequest.prompt if options.prompt is None else options.prompt
        dtype = torch.float32 if options.dtype is None else getattr(torch, options.dtype)
        length, offload = options.max_sequence_length, bool(options.offload)
        request = SampleRequest(prompt, options.size, length, options.device, dtype, offload)
    elif unheard := [n for n in _OF_SAMPLE if getattr(options, n) is not None]:
        parser.error(f"--{unheard[0]} is for --sample")
    count = failures = warnings = 0
    for check in verify(options.folder, options.base, request):
        count, failures, warnings = count + 1, failures + (not check.passed), warnings + check.warning
        result = "FAIL" if not check.passed else "warn" if check.warning else "pass"
        print(f"{result}  {check.name.ljust(24)}  {check.detail}", flush=True)
    also = f", {warnings} with a warning" if warnings else ""
    print((f"{failures} of {count} checks failed" if failures else f"all {count} checks passed") + also)
    return 1 if failures else 0


def _convert(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if options.layout is not None:
        for name in ("base", "rank", "dtype", "relative_to", "network"):
            if getattr(options, name) is not None:
                parser.error(f"--{name.replace('_', '-')} is not for --layout")
        return _convert_layout(options)
    if options.family is not None:
        parser.error("--family is for --layout")
    if (options.rank is None) == (options.to == "lora"):
        parser.error("--to lora needs --rank" if options.to == "lora" else "--rank is for --to lora")
    if options.to != "lora":
        for name in ("relative_to", "network"):
            if getattr(options, name) is not None:
                parser.error(f"--{name.replace('_', '-')} is for --to lora")
    import torch

    from .convert.conversions import Conversion
    from .folder import PhasedExperts

    dtype = getattr(torch, options.dtype) if options.dtype else None
    conversion = Conversion(
        PhasedExperts.open(options.source), options.output, options.base, dtype, options.overwrite, _warn
    )
    if options.to == "lora":
        summary = conversion.to_lora(options.rank, options.relative_to, options.network).training["conversions"][-1]
        for name, found in summary["experts"].items():
            print(
                f"{name}: relative error {found['relative_error_mean']:.2%} on average, "
                f"{found['relative_error_worst']:.2%} at worst ({found['worst_module']}); left out "
                f"{found['changed_weights_left_out']} changed weights that a LoRA does not hold, by at most "
                f"{found['largest_change_left_out']:.2%}"
            )
            if lower := found["relative_error_by_rank"]:
                print("  on average at rank " + ", ".join(f"{rank}: {error:.2%}" for rank, error in lower.items()))
    else:
        written = {"full": conversion.to_full, "comfyui": conversion.to_comfyui, "diffusers": conversion.to_diffusers}
        for name, dtypes in written[options.to]().training["conversions"][-1]["stored_as"].items():
            print(f"{name}: stored as {', '.join(dtypes)}")
    print(options.output)
    return 0


def _convert_layout(options: argparse.Namespace) -> int:
    from .convert.layouts import convert_layout
    from .lora.keys import summary

    written = convert_layout(options.source, options.output, options.layout, options.family, options.overwrite)
    for name, left_out in written.items():
        if left_out:
            _warn(f"{name}: {len(left_out)} keys have no place in the layout {options.layout}: {summary(left_out)}")
    print(options.output)
    return 0


def _set_strength(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from .folder import PhasedExperts
    from .hub.card import is_generated, write_card

    experts, wanted = PhasedExperts.open(options.folder), dict(options.strength)
    if "" in wanted and len(options.strength) > 1:
        parser.error("give one strength for all experts, or NAME=S for each")
    if len(wanted) < len(options.strength):
        parser.error("an expert is named twice")
    experts = experts.at_strength(wanted.get("", wanted))
    card = experts.folder / "README.md"
    generated = card.is_file() and is_generated(card.read_text(encoding="utf-8"))
    experts.save_pretrained(experts.folder)
    if generated:
        write_card(experts.folder, experts.manifest)
    elif card.is_file():
        _warn(f"{card} is of your own words and was left as it is: say the strength there")
    for expert in experts.manifest.experts:
        print(f"{expert.name}: strength {expert.strength:g}")
    return 0


def _plan(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if options.list == (options.name is not None):
        parser.error("give the name of a preset, or --list")
    if options.list:
        print(list_presets())
        return 0
    plan = PhasePlan.preset(options.name)
    preset = find_preset(options.name)
    print(f"{preset.title}\nbase        {preset.base}")
    for phase, file in zip(plan.phases, preset.files, strict=False):
        print(f"{phase.name.ljust(12)}{file}")
    print(f"guidance    {preset.guidance:g}{' (none)' if preset.guidance == 1 else ''}\nsource      {preset.source}\n")
    print(plan.describe())
    return 0


def _warn(text: str) -> None:
    print(f"phased-dmd: warning: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

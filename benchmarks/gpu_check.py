"""What a GPU run will meet, in one command of at most eight minutes: ``python benchmarks/gpu_check.py``.

Each check is a process of its own with a limit of time; what fails or takes too long is a line in the table and the
next one follows. Nothing is downloaded: teachers are the embedded one and random weights of the released architectures.
Python packages that are missing are taken from the wheels that ``make gpu-wheels`` collects. Writes
docs/benchmarks/gpu.json and .md with the name of the device, and prints the table last.

``--rehearse`` does all of it on a CPU in a minute, with tiny networks: it shows that the checks run.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(ROOT))

WHEELS, PACKAGES = ROOT / "build" / "gpu-wheels", ROOT / "build" / "gpu-packages"
NEEDED = {"diffusers": "diffusers", "transformers": "transformers", "peft": "peft", "accelerate": "accelerate"}
NEEDED |= {"pydantic": "pydantic", "yaml": "pyyaml", "psutil": "psutil", "tqdm": "tqdm", "torchao": "torchao"}
NEEDED |= {"filelock": "filelock", "PIL": "pillow", "ftfy": "ftfy", "matplotlib": "matplotlib"}
"""Modules, and the packages that have them."""
Row = dict[str, Any]
SMALL = ["model.height=64", "model.width=64", "model.max_sequence_length=16", "fake_updates=1"]
"""A rehearsal's samples."""


def demo(device: str, rehearse: bool) -> Iterator[Row]:
    """The embedded demo, shortened: trained and evaluated."""
    updates, samples = (1, 2) if rehearse else (40, 4)  # diversity takes two
    with tempfile.TemporaryDirectory() as folder:
        config = ROOT / "training/configs/embedded_demo.yaml"
        overrides = [f"updates={updates}", "validation.every=null", "monitoring.tracker=null"]
        if rehearse:
            overrides += ["batch_size=2", "draws_per_rollout=1", "validation.seeds=1", "validation.teacher_steps=null"]
            overrides += ["validation.prompts=[a pizza on a pink background]", "monitoring.page=false"]
        train = [sys.executable, "training/distill.py", "--config", str(config), "--output_dir", folder, *overrides]
        yield {"what": "embedded demo, trained", "seconds": _seconds(train)}
        evaluate = [sys.executable, "training/evaluate.py", "--experts", f"{folder}/experts", "--output_dir", folder]
        evaluate += ["--seeds", str(samples), "--no_noise_floor", "--few_steps"]
        evaluate += ["--metrics", "diversity"] if rehearse else ["--metrics", "frechet", "diversity"]
        evaluate += ["--prompts", f"{folder}/one.txt"] if rehearse else []
        (Path(folder) / "one.txt").write_text("a pizza on a pink background\n", encoding="utf-8")
        row: Row = {"what": "embedded demo, evaluated", "seconds": _seconds(evaluate)}
        report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
        yield row | {key: value for key, value in report["rows"][-1].items() if key in ("frechet", "diversity")}


def _seconds(command: Sequence[str]) -> float:
    """Of a command. Raises RuntimeError with its last lines."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(" ".join((done.stderr or done.stdout).split())[-300:])
    return time.perf_counter() - start


def qwen_image(device: str, rehearse: bool) -> Iterator[Row]:
    """Qwen-Image 20B, both phases, an update each."""
    yield from _updates("qwen_image", 1 if rehearse else None, SMALL if rehearse else [], (0, 1), device)


def wan_ten_blocks(device: str, rehearse: bool) -> Iterator[Row]:
    """Wan 14B with 10 of its blocks: attention, compiled blocks, activations in host memory."""
    layers, small = (1, [*SMALL, "model.frames=5"]) if rehearse else (10, [])
    ways = [[], ["attention=cudnn"], ["attention=flash"], ["memory.offload_activations=true"]]
    ways += [] if rehearse else [["compile=regional"]]
    for way in ways:
        yield from _guarded(" ".join(way), partial(_updates, "wan2_1_t2v_14b", layers, [*small, *way], (0,), device))


def wan(device: str, rehearse: bool) -> Iterator[Row]:
    """Wan 14B whole, one update of its first phase."""
    layers, small = (1, [*SMALL, "model.frames=5"]) if rehearse else (None, [])
    yield from _updates("wan2_1_t2v_14b", layers, small, (0,), device)


def float8(device: str, rehearse: bool) -> Iterator[Row]:
    """A frozen product of the size of Wan 14B's feed-forward layers: in bfloat16, and by torchao's ways to 8 bits."""
    import torch
    from torch import nn
    from torchao import quantization
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    tokens, width = (64, 64) if rehearse else (32_760, 5_120)

    def product(way: str, compiled: bool) -> Iterator[Row]:
        layer: Any = nn.Sequential(nn.Linear(width, 4 * width, device=device, dtype=torch.bfloat16))
        layer.requires_grad_(False)
        if way in (stored, computed):
            name = "Float8WeightOnlyConfig" if way == stored else "Float8DynamicActivationFloat8WeightConfig"
            quantization.quantize_(layer, getattr(quantization, name)())
        elif way == both:  # gradients of the input are products in float8, too
            convert_to_float8_training(layer, config=Float8LinearConfig(emulate=device == "cpu"))
        if compiled:
            layer.compile()
        x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        for backwards in (False, True):
            seconds = []
            for _ in range(4):
                start = time.perf_counter()
                with torch.set_grad_enabled(backwards):
                    found = layer(x)
                if backwards:
                    found.backward(torch.ones_like(found))
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
            done = "forwards and backwards" if backwards else "forwards"
            yield {"what": f"{way}{', compiled' if compiled else ''}, {done}", "seconds": min(seconds)}

    stored, computed, both = "weights in float8", "computed in float8", "computed in float8, gradients too"
    for way in ("bfloat16", stored, computed, both):
        for compiled in (False,) if rehearse else (False, True):
            yield from _guarded(f"{way}{', compiled' if compiled else ''}", partial(product, way, compiled))


def offloading(device: str, rehearse: bool) -> Iterator[Row]:
    """A14B with 4 of its blocks in each network: one network on the device at a time, from pinned memory."""
    layers, small = (1, [*SMALL, "model.frames=5"]) if rehearse else (4, [])
    yield from _updates("wan2_2_t2v_a14b", layers, small, (1,), device)


def _updates(
    model: str, layers: int | None, overrides: Sequence[str], phases: Sequence[int], device: str
) -> Iterator[Row]:
    from benchmarks.cost.full_size import measure, recipe_of

    with tempfile.TemporaryDirectory() as folder:
        small = [f"model.architecture={_narrow(model, Path(folder) / 'narrow')}"] if SMALL[0] in overrides else []
        config = recipe_of(
            model, ["compile=none", *small, *overrides]
        )  # compiling takes minutes: it is a way of its own
        rows = [measure(config, layers, phase, 1, device) for phase in phases]
    for row in rows:
        told = {key: row[key] / 2**30 for key in ("held", "peak") if key in row}
        what = f"{model}, {row['phase']}" + (f", {layers} blocks" if layers else "")
        seconds: Row = {"seconds": row["seconds"][0]} if "seconds" in row else {"failed": row["failed"]}
        seconds |= {"said": "; ".join(row["said"])} if "said" in row else {}
        yield {"what": f"{what} {' '.join(o for o in overrides if o not in SMALL)}".strip()} | seconds | told


def _narrow(model: str, folder: Path) -> Path:
    """The architecture of a recipe with two heads in each network: what a rehearsal builds."""
    from benchmarks.cost.full_size import recipe_of

    shutil.copytree(ROOT / str(recipe_of(model, []).model.architecture), folder)
    for path in folder.glob("transformer*/config.json"):
        settings = json.loads(path.read_text(encoding="utf-8")) | {"num_attention_heads": 2}
        settings |= {"ffn_dim": 512} if "ffn_dim" in settings else {}
        path.write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _guarded(what: str, rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows, and a line where there are none."""
    try:
        yield from rows()
    except Exception as error:
        yield {"what": what, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def experts(device: str, rehearse: bool) -> Iterator[Row]:
    """Switching experts and few steps, merged and not, at 100 million parameters and at the width of 14B."""
    sizes = [("100 M", [])] if rehearse else [("100 M", []), ("width of 14B", ["--heads", "80", "--layers", "2"])]
    for name, key in (("expert_switch", "percent_of_forward"), ("few_step_speed", "times_faster")):
        for size, settings in sizes:
            with tempfile.TemporaryDirectory() as folder:
                small = ["--side", "64"]
                if rehearse:
                    small = ["--layers", "1", "--heads", "2", "--side", "8", "--repetitions", "2"]
                command = [sys.executable, f"benchmarks/cost/{name}.py", "--device", device, *settings, *small]
                yield {"what": f"{name}, {size}", "seconds": _seconds([*command, "--output", f"{folder}/found"])}
                found = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
            for row in found["rows"]:
                what = f"{name}, {size}: {row.get('experts', row.get('what'))}"
                yield {"what": what, key: row[key]["median"]}


def synchronisations(device: str, rehearse: bool) -> Iterator[Row]:
    """Where the evaluations of an update wait for the device: nowhere."""
    import torch

    from benchmarks.cost.random_training import RandomTraining, small_config, small_teacher
    from training.loop.precision import make_accelerator

    for name in ("wan_two_networks", "qwen_image"):
        precision = "no" if device == "cpu" else "bf16"
        config = small_config(precision=precision, fake_updates=1, memory={"micro_batch_size": 1})
        training = RandomTraining(config, small_teacher(name, "tiny", 8, device), make_accelerator(precision, device))
        training.update()
        phase, batch = training.training, training.batches.draw(negative=True)
        renoising = training.batches.renoising(phase.distiller, batch.noise)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            with phase.accelerator.autocast():
                rollout = phase.distiller.expert_rollout(batch, 0)  # random prompts are on the device already
                phase.distiller.generator_loss(rollout, batch, renoising).loss.backward()
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        yield {"what": f"{name}: evaluations wait for the device", "times": 0}


CHECKS: dict[str, tuple[Callable[[str, bool], Iterator[Row]], int]] = {
    "synchronisations": (synchronisations, 40),
    "float8": (float8, 60),
    "experts": (experts, 60),
    "wan_ten_blocks": (wan_ten_blocks, 120),
    "qwen_image": (qwen_image, 120),
    "offloading": (offloading, 60),
    "wan": (wan, 90),
    "demo": (demo, 90),
}
"""Every check, and its limit in seconds."""
LIMIT = 480
"""Seconds of all checks; those that do not begin before are said to be left out."""


def run(name: str, device: str, rehearse: bool, limit: float) -> list[Row]:
    """The rows of a check in a process of its own; in a rehearsal a fork of this one, which imports libraries once."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.jsonl"
        start, before = time.perf_counter(), _used()
        reason = (_in_a_fork if rehearse else _in_a_process)(name, device, output, limit)
        lines = output.read_text(encoding="utf-8").splitlines() if output.is_file() else []
    rows = [{"check": name, **json.loads(line)} for line in lines]
    failed: list[Row] = [{"check": name, "what": "", "failed": reason}] if reason else []
    took = f"{time.perf_counter() - start:.0f} s, {_used() - before:.1f} of processors"
    print(f"{name}: {took} {reason[:100]}", flush=True)
    return rows + failed


def _used() -> float:
    """Processor seconds of all processes that were started and have ended."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def _in_a_process(name: str, device: str, output: Path, limit: float) -> str:
    """Returns why it failed; empty when it did not."""
    command = [sys.executable, str(Path(__file__)), "--check", name, "--device", device, "--rows", str(output)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True) as process:
        try:
            _, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
            return f"stopped after {limit:.0f} s"
    return " ".join(errors.split())[-300:] if process.returncode else ""


def _in_a_fork(name: str, device: str, output: Path, limit: float) -> str:
    """As ``_in_a_process``."""
    process = multiprocessing.get_context("fork").Process(target=_guarded_check, args=(name, device, output))
    process.start()
    assert process.pid is not None
    with suppress(ProcessLookupError):  # of one that has ended; here too, since the fork may be stopped before it did
        os.setpgid(process.pid, process.pid)
    process.join(limit)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return f"stopped after {limit:.0f} s"
    failed = output.with_suffix(".failed")
    return failed.read_text(encoding="utf-8") if failed.is_file() else "" if process.exitcode == 0 else "it ended"


def _guarded_check(name: str, device: str, output: Path) -> None:
    os.setpgid(0, 0)
    try:
        check(name, device, True, output)
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
        output.with_suffix(".failed").write_text(text, encoding="utf-8")


def check(name: str, device: str, rehearse: bool, output: Path) -> None:
    """One check, whose rows are written as they come."""
    with output.open("w", encoding="utf-8") as file:
        for row in CHECKS[name][0](device, rehearse):
            file.write(json.dumps(row) + "\n")
            file.flush()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each row."""
    lines = ["| check | what | seconds | held, GiB | peak, GiB | found |", "| --- | --- | ---: | ---: | ---: | --- |"]
    for row in rows:
        numbers = [f"{row[key]:.3g}" if key in row else "" for key in ("seconds", "held", "peak")]
        others = {k: v for k, v in row.items() if k not in ("check", "what", "seconds", "held", "peak")}
        found = ", ".join(f"{k}: {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in others.items())
        lines.append(f"| {row['check']} | {row['what']} | {' | '.join(numbers)} | {found.replace('|', ' ')} |")
    return "\n".join(lines)


def add_packages() -> None:
    """Install what is missing from the collected wheels, without a network, into a folder of this repository."""
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing and WHEELS.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", f"--find-links={WHEELS}"]
        files = sorted(map(str, WHEELS.glob("*.whl")))
        subprocess.run([*pip, "--target", str(PACKAGES), "--upgrade", *files], check=False)
    if PACKAGES.is_dir():  # after what is there: nothing of the machine is replaced
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(PACKAGES)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="tiny networks on a CPU")
    parser.add_argument("--checks", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/gpu")
    parser.add_argument("--check", choices=list(CHECKS), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = arguments.device or ("cpu" if arguments.rehearse else "cuda")
    arguments.output = arguments.output.absolute()
    os.chdir(ROOT)
    if arguments.check:
        check(arguments.check, device, arguments.rehearse, arguments.rows)
        return
    if device == "cpu" and not arguments.rehearse:
        parser.error("these checks are for a GPU; --rehearse shows on a CPU that they run")
    add_packages()
    if arguments.rehearse:
        importlib.import_module("benchmarks.cost.full_size")  # and with it what all forks need
    rows: list[Row] = []
    start = time.perf_counter()
    for name in arguments.checks:
        left = (4 if arguments.rehearse else 1) * LIMIT - (time.perf_counter() - start)
        if left < 10:
            rows.append({"check": name, "what": "", "failed": "left out, the time was over"})
            continue
        rows += run(name, device, arguments.rehearse, left if arguments.rehearse else min(CHECKS[name][1], left))
        write(arguments.output, rows, device, arguments.rehearse)
    print(table(rows))


def write(path: Path, rows: Sequence[Row], device: str, rehearsed: bool) -> None:
    """What was found so far, as .json and .md."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    about = (
        f"{name}, torch {torch.__version__}. Random weights, but for the demo. Written by `benchmarks/gpu_check.py`."
    )
    if rehearsed:
        about = (
            "**There is no table of a GPU here: none was at hand.** What follows is a rehearsal on a CPU with tiny "
            "networks: it shows that the checks run, and its numbers say nothing of the real models. On a GPU, `python "
            "benchmarks/gpu_check.py` replaces this page."
        )
    from benchmarks.cost.results import write_result

    result = {"device": name, "torch": torch.__version__, "rehearsal": rehearsed, "rows": list(rows)}
    write_result(path, result, f"# On a GPU\n\n{about}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()

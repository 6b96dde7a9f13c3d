"""A part of the suite on other versions of Python, torch and diffusers, each row in an environment of its own.

    python .ci/versions.py [ROW ...]

Environments lie in .versions/ and are made once; ``rm -r .versions`` for new versions. The last lines are rows for the
table of docs/dependencies.md.

torch on PyPI is built for CUDA and asks for gigabytes of NVIDIA's libraries, which nothing here calls. It is installed
without them. Libraries whose functions all answer "no device" stand in their place, so that torch loads.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".versions"


class Row(NamedTuple):
    """An environment."""

    python: str
    torch: str
    """What pip is asked for."""
    packages: list[str]


OTHER_ANSWERS = {
    "cudaGetErrorName": 'char *cudaGetErrorName(int e) { return "no device"; }\n',
    "cudaGetErrorString": 'char *cudaGetErrorString(int e) { return "no device"; }\n',
    "cudaStreamIsCapturing": "int cudaStreamIsCapturing(void *s, int *answer) { return *answer = 0; }\n",
}
"""Functions in C that are asked where there is no device, too."""
LIBRARIES = ["diffusers", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub"]
ROWS = {
    "oldest": Row("3.11", "torch==2.7.0", ["--requirement", str(ROOT / ".ci" / "oldest.txt")]),
    "newest, Python 3.11": Row("3.11", "torch", LIBRARIES),
    "newest, Python 3.12": Row("3.12", "torch", LIBRARIES),
    "newest, Python 3.13": Row("3.13", "torch", LIBRARIES),
}
TESTS = ["pytest", "pytest-timeout", "hypothesis", "numpy", "pillow", "pyyaml", "pydantic", "psutil", "tqdm"]
TESTS += ["ftfy", "filelock", "opencv-python-headless", "protobuf"]
"""What the tests need beside that, of any version."""
PART = ["scheduler", "families/test_registry.py", "roles", "experts/hub/test_objects.py"]
PART += [f"pipelines/test_{name}.py" for name in ("attach", "calls", "equality", "lora_files", "matrix", "own_loras")]
PART += [f"pipelines/test_{name}.py" for name in ("refusals", "saving", "threads")]
"""The tests that run, below tests/pdmd_core."""


def main(names: list[str]) -> int:
    """Run; returns the exit status."""
    if unknown := sorted({*names} - {*ROWS}):
        print(f"expected rows {', '.join(map(repr, ROWS))}, found {', '.join(map(repr, unknown))}", file=sys.stderr)
        return 2
    results, failed = [], False
    for name in names or list(ROWS):
        row = ROWS[name]
        if (python := find_python(row.python)) is None:
            results.append(f"| {name} | | no Python {row.python} here |")
            continue
        folder = FOLDER / re.sub(r"\W+", "-", name)
        if not (folder / "made").is_file():
            make(folder, python, row)
        command = [folder / "bin" / "python", "-m", "pytest", "-q", *(f"tests/pdmd_core/{part}" for part in PART)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        print(done.stdout[-20_000:], flush=True)
        failed = failed or done.returncode != 0
        counted = re.findall(r"\d+ (?:passed|failed|skipped|error)", done.stdout.rpartition("\n=")[2][-200:])
        results.append(f"| {name} | {versions(folder)} | {', '.join(counted)} |")
    print("| row | versions | tests |", "| --- | --- | --- |", *results, sep="\n")
    return int(failed)


def find_python(version: str) -> Path | None:
    """An interpreter of this version, on the path or of pyenv."""
    found = [shutil.which(f"python{version}"), *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))]
    for path in filter(None, found):
        done = subprocess.run([path, "-c", "import sys; print(*sys.version_info[:2], sep='.')"], capture_output=True)
        if done.stdout.decode().strip() == version:
            return Path(path)
    return None


def make(folder: Path, python: Path, row: Row) -> None:
    """Make an environment."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", row.torch], check=True)
    (torch,) = folder.glob("lib/python3*/site-packages/torch")
    without_cuda(torch)
    subprocess.run([*pip, *row.packages, *TESTS], check=True)
    (folder / "made").touch()


def without_cuda(torch: Path) -> None:
    """Let an installed torch load without NVIDIA's libraries, and ask for none."""
    for metadata in torch.parent.glob("torch-*.dist-info/METADATA"):
        text = metadata.read_text(encoding="utf-8")
        metadata.write_text(re.sub(r"^Requires-Dist: (?:nvidia|cuda|triton).*\n", "", text, flags=re.M), "utf-8")
    files = [path for path in (torch / "lib").iterdir() if ".so" in path.name]
    needed, versioned, wanted, defined = set(), {}, set(), set()
    for path in files:
        needed |= set(re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-dW", path)))
        for library, entries in re.findall(r"File: (\S+) .*\n((?:.* Name: .*\n)+)", output("readelf", "-VW", path)):
            versioned.setdefault(library, set()).update(re.findall(r"Name: (\S+)", entries))
        wanted |= {line.split()[-1] for line in output("nm", "-D", "--undefined-only", path).splitlines()}
        symbols = output("nm", "-D", "--defined-only", path).splitlines()
        defined |= {line.split()[-1].partition("@")[0] for line in symbols}
    system = set(re.findall(r"^\s+(\S+) \(", output("/sbin/ldconfig", "-p"), flags=re.M))
    missing = sorted(needed - system - {path.name for path in files})
    plain = {name for name in wanted - defined if re.match(r"(?:cu|nv|nccl)\w+$", name)}
    for library in missing:
        names, script = set(), ""
        for version in sorted(versioned.get(library, ())):
            own = {name.partition("@")[0] for name in wanted if name.endswith(f"@{version}")}
            script += f"{version} {{ global: {' '.join(f'{name};' for name in sorted(own)) or '_none;'} }};\n"
            names |= own
        # which library a function without a version is of cannot be told: each that has no versions has all of them
        write_library(torch / "lib" / library, names if script else plain, script)


def write_library(path: Path, names: set[str], script: str) -> None:
    """Write a library of functions that answer 100, which is CUDA's "no device"."""
    code = "".join(OTHER_ANSWERS.get(name, f"int {name}(void) {{ return 100; }}\n") for name in sorted(names))
    command = ["cc", "-shared", "-fPIC", "-w", "-fno-builtin", "-x", "c", "-", "-o", path, f"-Wl,-soname,{path.name}"]
    if script:
        versions_of = path.with_suffix(".map")
        versions_of.write_text(script, encoding="utf-8")
        command.append(f"-Wl,--version-script={versions_of}")
    subprocess.run(command, input=code, text=True, check=True)


def versions(folder: Path) -> str:
    """What is installed, in words."""
    names = ("torch", *LIBRARIES)
    code = "import platform; from importlib.metadata import version\nprint('Python', platform.python_version(), end='')"
    code += f"\nfor name in {names!r}: print(f', {{name}} {{version(name)}}', end='')"
    return output(folder / "bin" / "python", "-c", code)


def output(*command: str | Path) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

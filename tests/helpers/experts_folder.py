"""What a valid experts folder has, ways to change it, and how it is refused then."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from torch import Tensor

from pdmd_core.experts import MANIFEST_NAME, ExpertsError, PhasedExperts, read_manifest
from pdmd_core.families import family
from pdmd_core.phases import PhasePlan
from tests.helpers.manifests import one_line

PLAN = PhasePlan.from_steps([2, 2], shift=5.0)
WAN = family("wan")
RANK, ALPHA = 4, 6.0
MODULE = "diffusion_model.blocks.1.cross_attn.k"


@contextlib.contextmanager
def refused(*fragments: str) -> Iterator[None]:
    """The block raises ExpertsError with one line that holds all fragments."""
    with pytest.raises(ExpertsError) as caught:
        yield
    text = one_line(caught.value)
    assert all(fragment in text for fragment in fragments), text


def rewrite(folder: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> PhasedExperts:
    """Change the tensors of one expert's file and give the manifest the hash of the new file."""
    manifest = read_manifest(folder)
    path = folder / manifest.expert(name).file
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    accept(folder, name)
    return PhasedExperts.open(folder)


def accept(folder: Path, name: str, **changes: Any) -> None:
    """Give the manifest the hash that an expert's file has now."""
    manifest = read_manifest(folder)
    digest = hashlib.sha256((folder / manifest.expert(name).file).read_bytes()).hexdigest()
    experts = [replace(e, sha256=digest, **changes) if e.name == name else e for e in manifest.experts]
    (folder / MANIFEST_NAME).write_text(replace(manifest, experts=tuple(experts)).to_json())

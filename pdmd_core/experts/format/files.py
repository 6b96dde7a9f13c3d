"""What a manifest promises of its files: they are there, inside their folder, unchanged, and carry the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ...hashing import sha256_of
from ..errors import ExpertsError
from .manifest import Expert, Manifest
from .untrusted import check_inside, parse_json

METADATA_KEY = "phased_experts"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
RELEASED = "files"
"""Key of ``Manifest.training``: names of LoRA files that other projects released (``convert.released``)."""


def check_folder(folder: Path, manifest: Manifest) -> None:
    """Raises ExpertsError unless every file of the manifest is there, inside the folder."""
    for expert in manifest.experts:
        path = folder / expert.file
        if not path.is_file():
            raise ExpertsError(f"{folder}: {expert.file} of expert {expert.name!r} is missing; download it again")
        check_inside(path, folder)


def check_hash(path: Path, expert: Expert) -> None:
    """Raises ExpertsError unless the file has the manifest's hash."""
    found = sha256_of(path)
    if found != expert.sha256:
        raise ExpertsError(
            f"{path}: sha256 is {found[:12]}..., the manifest says {expert.sha256[:12]}...: the file was "
            "changed or cut off, download it again"
        )


def expert_metadata(manifest: Manifest, expert: Expert) -> dict[str, str]:
    """What makes a single file explain itself: the manifest without hashes, under one key."""
    return {METADATA_KEY: json.dumps({"expert": expert.name, "manifest": manifest.without_hashes().to_dict()})}


def read_expert_metadata(metadata: Mapping[str, str]) -> tuple[Manifest, Expert]:
    """The manifest that a file carries, and which of its experts the file is. Raises ValueError when there is none."""
    try:
        carried = parse_json(metadata[METADATA_KEY])
        manifest = Manifest.from_dict(carried["manifest"])
        return manifest, manifest.expert(carried["expert"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"no {error}" if isinstance(error, KeyError) else "not an object of manifest and expert"
        ) from None

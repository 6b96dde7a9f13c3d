"""What a manifest promises of its files: they exist, inside their folder, unchanged, and carry the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ...hashing import sha256_of
from ..errors import ExpertsError
from .manifest import Expert, Manifest
from .untrusted import check_inside, parse_json, read_json

METADATA_KEY = "phased_experts"
"""The key under which a file carries its manifest in its safetensors metadata."""
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
"""The path of the scheduler's config in an experts folder."""
SCHEDULER_ENTRY = ["pdmd_core", "PhasedDMDScheduler"]
"""The scheduler in a model_index.json: what diffusers loads where ``pdmd_core`` was imported, and refuses elsewhere."""
GUIDANCE = "_phased_guidance_scale"
"""The key of model_index.json for the guidance of full experts."""
RELEASED = "files"
"""The key of ``Manifest.training`` for the names of LoRA files that other projects released (``convert.released``)."""


def check_folder(folder: Path, manifest: Manifest) -> None:
    """Check that every file of the manifest exists, inside the folder.

    Args:
        folder: The experts folder.
        manifest: Its manifest.

    Raises:
        ExpertsError: If a file is missing, or is a link that leaves the folder.
    """
    for expert in manifest.experts:
        path = folder / expert.file
        if not path.is_file():
            raise ExpertsError(f"{folder}: {expert.file} of expert {expert.name!r} is missing; download it again")
        check_inside(path, folder)


def check_hash(path: Path, expert: Expert) -> None:
    """Check that a file has the manifest's hash.

    Args:
        path: The file.
        expert: Its entry in the manifest.

    Raises:
        ExpertsError: If the hash is another.
    """
    found = sha256_of(path)
    if found != expert.sha256:
        raise ExpertsError(
            f"{path}: sha256 is {found[:12]}..., the manifest says {expert.sha256[:12]}...: the file was "
            "changed or cut off, download it again"
        )


def check_scheduler(folder: Path, manifest: Manifest) -> None:
    """Check that the scheduler of an experts folder is there and has the manifest's plan.

    Args:
        folder: The experts folder.
        manifest: Its manifest.

    Raises:
        ExpertsError: If it is missing, or has another plan.
    """
    path = folder / SCHEDULER_CONFIG
    check_inside(path, folder)
    config = read_json(path)
    if not isinstance(config, dict) or config.get("plan") != manifest.plan.to_dict():
        raise ExpertsError(f"{path}: its plan is not the manifest's")


def expert_metadata(manifest: Manifest, expert: Expert) -> dict[str, str]:
    """Make the metadata by which a single file explains itself: the manifest as it was trained, under one key.

    Args:
        manifest: The manifest.
        expert: The expert whose file it is.

    Returns:
        Metadata for a safetensors file.
    """
    return {METADATA_KEY: json.dumps({"expert": expert.name, "manifest": manifest.as_trained().to_dict()})}


def read_expert_metadata(metadata: Mapping[str, str]) -> tuple[Manifest, Expert]:
    """Read the manifest that a file carries.

    Args:
        metadata: The metadata of a safetensors file.

    Returns:
        The manifest, and the expert in it that the file is of.

    Raises:
        ValueError: If the metadata carries no manifest, or an invalid one.
    """
    try:
        carried = parse_json(metadata[METADATA_KEY])
        manifest = Manifest.from_dict(carried["manifest"])
        return manifest, manifest.expert(carried["expert"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"no {error}" if isinstance(error, KeyError) else "not an object of manifest and expert"
        ) from None

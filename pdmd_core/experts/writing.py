"""Writing an experts folder.

Each file carries the manifest as it was trained in its safetensors metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from .errors import ExpertsError
from .format.files import expert_metadata
from .format.manifest import MANIFEST_NAME, Manifest
from .format.weights import weights_of, write_weights


def write_experts(folder: Path, manifest: Manifest, weights: Mapping[str, Mapping[str, Tensor]]) -> Manifest:
    """Write the files of all experts, then the manifest. All is written before any of it takes its place.

    Args:
        folder: The folder to write into; it is made where it does not exist.
        manifest: The manifest, complete but for the hashes, which are filled in.
        weights: Expert name to the tensors of its file (``lora_to_file`` for LoRA experts).

    Returns:
        The manifest that was written.

    Raises:
        ExpertsError: If it could not be read back: an expert has no weights, values are not finite, or the manifest is
            not valid.
    """
    if lacking := [expert.name for expert in manifest.experts if expert.name not in weights]:
        given = ", ".join(weights) or "none"
        raise ExpertsError(f"cannot write {folder}: no weights of {', '.join(lacking)}, found those of {given}")
    Manifest.from_dict(manifest.as_trained().to_dict())
    folder.mkdir(parents=True, exist_ok=True)
    part = {name: folder / f".{name}.part" for name in [*(e.file for e in manifest.experts), MANIFEST_NAME]}
    try:
        experts = []
        for expert in manifest.experts:
            metadata, own = expert_metadata(manifest, expert), weights_of(weights[expert.name])
            try:
                experts.append(replace(expert, sha256=write_weights(part[expert.file], own, metadata)))
            except ExpertsError as error:
                raise ExpertsError(f"cannot write {folder}: {expert.name}: {error}") from None
        written = replace(manifest, experts=tuple(experts))
        part[MANIFEST_NAME].write_text(written.to_json(), encoding="utf-8")
        for name, path in part.items():
            path.replace(folder / name)
    finally:
        for path in part.values():
            path.unlink(missing_ok=True)
    return written

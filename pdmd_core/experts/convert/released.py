"""Few-step LoRA files that other projects released (Wan2.2-Lightning, Qwen-Image-Lightning, ...) as phased experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...families import family_of_lora
from ...hashing import sha256_of
from ...phases import PhasePlan
from ..errors import ExpertsError
from ..format.files import METADATA_KEY, RELEASED
from ..format.header import read_header
from ..format.lora_report import lora_report
from ..format.manifest import BaseModel, Expert, Manifest
from ..format.weights import Weights, open_weights


def manifest_of_lora_files(
    paths: Mapping[str, Path],
    plan: PhasePlan,
    base: str | None = None,
    components: Sequence[str] | None = None,
) -> Manifest:
    """Make the manifest that LoRA files without one have as the experts of a plan.

    Rank and alpha are read from the files, where alpha is a tensor beside each module or, without one, the rank.

    Args:
        paths: Phase name to file, one for each phase of the plan.
        plan: The sigmas that the files were distilled for: their authors' card says steps and shift.
        base: Hub id or folder of the base; None for the one that most files of this family belong to.
        components: The base's network of each expert; None for those that this many files of the family are for.

    Returns:
        The manifest, which names the files as they would be in a folder of experts.

    Raises:
        ExpertsError: If the files are not LoRA files of one family, one for each phase, or nothing tells their base.
    """
    names = [phase.name for phase in plan.phases]
    if set(paths) != set(names):
        raise ExpertsError(f"the plan has phases {', '.join(names)}, found files for {', '.join(paths) or 'none'}")
    read = {name: _read(paths[name]) for name in names}
    found = {name: family_of_lora(modules) for name, (_, modules) in read.items()}
    kind = found[names[0]]
    if kind is None or len({each and each.name for each in found.values()}) > 1:
        which = ", ".join(f"{paths[name].name}: {each.name if each else 'unknown'}" for name, each in found.items())
        raise ExpertsError(f"the files must be of one model family, which their keys tell; found {which}")
    if base is None and kind.default_base is None:
        raise ExpertsError(f"LoRA files of {kind.title} belong to several bases: give the Hub id or folder of theirs")
    if components is None:
        components = kind.released_components(len(names))
    if len(components) != len(names):
        raise ExpertsError(f"one component for each of the {len(names)} experts is needed, found {len(components)}")
    experts = tuple(
        _expert(name, paths[name], *read[name], component) for name, component in zip(names, components, strict=True)
    )
    origin = BaseModel(str(base or kind.default_base), kind.architecture, kind.name)
    return Manifest(origin, plan, experts, 1.0, {RELEASED: [paths[name].name for name in names]})


def open_lora(path: Path) -> Weights:
    """Open anyone's LoRA file, also of kinds that only ComfyUI reads.

    Args:
        path: The file.

    Returns:
        Its tensors, which are read when asked for.

    Raises:
        ExpertsError: If it is no safetensors file, an alpha is not one positive number, or alpha lies where most
            programs lose it.
    """
    if path.suffix not in (".safetensors", ".sft"):
        raise ExpertsError(f"{path}: only safetensors files are read, others can bring code: convert it to one")
    weights, metadata = open_weights(path), read_header(path).metadata
    alphas = [name for name in weights.specs if name.endswith(".alpha")]
    for name in alphas:
        if weights.specs[name].numel != 1 or not 0 < float(weights.read(name)) < math.inf:
            raise ExpertsError(f"{path}: {name} is not one positive number, by which the LoRA is scaled")
    report = lora_report(weights, metadata)
    inside = report.get("alpha_in_metadata")
    if inside and len(alphas) < report["modules"] and {*inside} != {*map(float, report["ranks"])}:
        ranks = ", ".join(map(str, report["ranks"])) or "unknown"
        raise ExpertsError(
            f"{path}: alpha {inside[0]:g} at rank {ranks} is in the metadata alone, where most programs lose it: add "
            "an .alpha tensor to each module"
        )
    return weights


def _read(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read what ``inspect`` says of a LoRA file, and its modules."""
    if path.is_dir():
        raise ExpertsError(f"{path}: a LoRA file is expected here, found a folder; open it with from_pretrained")
    weights = open_lora(path)
    metadata = read_header(path).metadata
    if METADATA_KEY in metadata:
        raise ExpertsError(f"{path}: an expert of this project; open its folder with from_pretrained")
    report = lora_report(weights, metadata)
    if not report or report["unpaired_modules"] or min(report["ranks"], default=0) < 1:
        raise ExpertsError(f"{path}: not a LoRA file: every module needs a down and an up projection")
    ups = (".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight")
    modules = [name.removesuffix(up) for name in weights.specs for up in ups if name.endswith(up)]
    return report, tuple(sorted(modules))


def _expert(name: str, path: Path, report: Mapping[str, Any], modules: tuple[str, ...], component: str) -> Expert:
    rank = max(report["ranks"])
    return Expert(
        name=name,
        file=f"{name}.safetensors",
        kind="lora",
        sha256=sha256_of(path),
        component=component,
        rank=rank,
        alpha=report["alphas"][0] if len(report["alphas"]) == 1 else float(rank),
        targets=modules,
    )

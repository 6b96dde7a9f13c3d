"""Few-step LoRA files that other projects released (Wan2.2-Lightning, Qwen-Image-Lightning, ...) as phased experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...families import FAMILIES, ModelFamily, family, family_of_lora, lora_family
from ...hashing import sha256_of
from ...phases import PhasePlan
from ..errors import ExpertsError
from ..format.files import METADATA_KEY, RELEASED
from ..format.header import read_header
from ..format.manifest import MAX_STRENGTH, MAX_TARGETS, BaseModel, Expert, Manifest
from ..format.untrusted import read_json
from ..format.weights import Weights, open_weights
from ..lora.alpha import Alphas, alphas_in
from ..lora.keys import by_module

UNKNOWN = "unknown"
"""The base, its network and family of LoRA files whose keys do not tell them: the pipeline does."""
GIVEN = "given_family"
"""The key of ``Manifest.training`` for a family that the user gave, which no pipeline may contradict."""
BESIDE = "adapter_config"
"""The key of ``Manifest.training`` for what lay beside files of PEFT: phase name to settings of alpha."""
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""The files that PEFT writes into a folder."""
_PEFT_SETTINGS = ("lora_alpha", "alpha_pattern", "use_rslora")


@dataclass(frozen=True)
class LoraSource:
    """A LoRA file that somebody else made."""

    path: Path
    """The file."""
    alphas: Alphas
    """What its metadata say of alpha."""
    beside: Mapping[str, Any]
    """What the ``adapter_config.json`` beside it says of alpha."""
    modules: Mapping[str, Mapping[str, str]]
    """Module to meaning to key."""
    shapes: Mapping[str, tuple[int, ...]]
    """The shapes of its tensors."""

    @property
    def family(self) -> ModelFamily | None:
        """The family that its keys tell."""
        return family_of_lora(list(self.modules))

    @property
    def ranks(self) -> list[int]:
        """All ranks that occur."""
        shapes = [self.shapes[keys["down"]] for keys in self.modules.values() if "down" in keys]
        return sorted({shape[0] for shape in shapes if shape})


def manifest_of_lora_files(
    paths: Mapping[str, Path],
    plan: PhasePlan,
    base: str | None = None,
    components: Sequence[str] | None = None,
    family_name: str | None = None,
    strength: float | Mapping[str, float] = 1.0,
) -> Manifest:
    """Make the manifest that LoRA files without one have as the experts of a plan.

    Args:
        paths: Phase name to file, or to a folder of PEFT; one for each phase of the plan.
        plan: The sigmas that the files were distilled for: their authors' card says steps and shift.
        base: Hub id or folder of the base; None for the one that most files of this family belong to.
        components: The base's network of each expert; None for those that this many files of the family are for.
        family_name: The family of the files, where their keys do not tell it or tell another.
        strength: The factor of what the files change, of all or by phase name; 1 is what was trained.

    Returns:
        The manifest, which names the files as they would be in a folder of experts. Where nothing tells their family
        or base, these are ``UNKNOWN``, and the pipeline that the experts are attached to tells them.

    Raises:
        ExpertsError: If the files are not LoRA files of one family, one for each phase.
    """
    names = [phase.name for phase in plan.phases]
    if set(paths) != set(names):
        raise ExpertsError(f"the plan has phases {', '.join(names)}, found files for {', '.join(paths) or 'none'}")
    if family_name is not None and family_name not in FAMILIES:
        raise ExpertsError(f"family is one of {', '.join(FAMILIES)}, found {family_name!r}")
    sources = {name: open_source(paths[name]) for name in names}
    kinds = {name: family(family_name) if family_name else source.family for name, source in sources.items()}
    known = [kind for kind in kinds.values() if kind is not None]
    if len({kind.name for kind in known}) > 1:
        which = ", ".join(f"{paths[name].name}: {kind.name if kind else UNKNOWN}" for name, kind in kinds.items())
        raise ExpertsError(f"the files must be of one model family, which their keys tell; found {which}")
    kind = known[0] if known else None
    if components is None:
        components = kind.released_components(len(names)) if kind else ("transformer",) * len(names)
    if len(components) != len(names):
        raise ExpertsError(f"one component for each of the {len(names)} experts is needed, found {len(components)}")
    strengths = strengths_by_name(strength, names)
    experts = tuple(
        _expert(name, sources[name], component, strengths[name])
        for name, component in zip(names, components, strict=True)
    )
    model = str(base or (kind and kind.default_base) or UNKNOWN)
    origin = BaseModel(model, kind.architecture if kind else UNKNOWN, kind.name if kind else UNKNOWN)
    training: dict[str, Any] = {RELEASED: [paths[name].name for name in names]}
    if family_name:
        training[GIVEN] = family_name
    if beside := {name: dict(source.beside) for name, source in sources.items() if source.beside}:
        training[BESIDE] = beside
    return Manifest(origin, plan, experts, 1.0, training)


def on_network(manifest: Manifest, architecture: str) -> Manifest:
    """Say of released files that they are of the network that a pipeline has, unless the user said what they are of.

    Args:
        manifest: A manifest.
        architecture: The class name of the pipeline's network.

    Returns:
        The manifest for this network; that of experts of this project as it is.
    """
    if RELEASED not in manifest.training or GIVEN in manifest.training or manifest.base.architecture == architecture:
        return manifest
    kind = lora_family(architecture)
    base = replace(manifest.base, architecture=architecture, family=kind.name if kind else architecture)
    return replace(manifest, base=base)


def open_lora(path: Path) -> Weights:
    """Open anyone's LoRA file, also of kinds that only ComfyUI reads.

    Args:
        path: The file.

    Returns:
        Its tensors, which are read when asked for.

    Raises:
        ExpertsError: If it is no safetensors file, or if an alpha is not one positive number.
    """
    if path.suffix not in (".safetensors", ".sft"):
        raise ExpertsError(f"{path}: only safetensors files are read, others can bring code: convert it to one")
    weights = open_weights(path)
    for name in (name for name in weights.specs if name.endswith(".alpha")):
        if weights.specs[name].numel != 1 or not 0 < float(weights.read(name)) < math.inf:
            raise ExpertsError(f"{path}: {name} is not one positive number, by which the LoRA is scaled")
    return weights


def open_source(path: Path, own: bool = False) -> LoraSource:
    """Look at anyone's LoRA file; of its tensors only alpha is read.

    Args:
        path: The file, or a folder of PEFT.
        own: Whether a single expert of this project counts as one.

    Returns:
        What it holds.

    Raises:
        ExpertsError: If it is no such file.
    """
    if path.is_dir():
        if not (path / PEFT_WEIGHTS).is_file():
            raise ExpertsError(f"{path}: a LoRA file is expected here, found a folder; open it with from_pretrained")
        path = path / PEFT_WEIGHTS
    weights, metadata = open_lora(path), read_header(path).metadata
    if METADATA_KEY in metadata and not own:
        raise ExpertsError(f"{path}: an expert of this project; open its folder with from_pretrained")
    modules, _ = by_module(weights.specs)
    if not any(set(meanings) - {"alpha"} for meanings in modules.values()):
        raise ExpertsError(f"{path}: not a LoRA file: no key of it is a LoRA's")
    for module, keys in modules.items():
        halves = [keys[half] for half in ("down", "up") if half in keys]
        if len(halves) == 1 or any(not weights.specs[key].shape or not weights.specs[key].numel for key in halves):
            raise ExpertsError(f"{path}: not a LoRA file: every module needs a down and an up projection, {module} not")
    config = path.with_name(PEFT_CONFIG)
    beside: dict[str, Any] = {}
    if path.name == PEFT_WEIGHTS and config.is_file():
        found = read_json(config)
        if not isinstance(found, dict):
            raise ExpertsError(f"{config}: an object is expected here")
        beside = {name: found[name] for name in _PEFT_SETTINGS if found.get(name)}
    try:
        alphas = alphas_in(metadata, beside)
    except ExpertsError as error:
        raise ExpertsError(f"{path}: {error}") from None
    return LoraSource(path, alphas, beside, modules, weights.shapes)


def strengths_by_name(
    strength: float | Mapping[str, float], names: Sequence[str], others: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Check strengths of LoRA experts and give each expert its own.

    Args:
        strength: The factor of what the experts change, of all or by name.
        names: The experts.
        others: The strengths of experts that are not named; 1 without them.

    Returns:
        The strength of each expert.

    Raises:
        ExpertsError: If a strength is not of an expert, or out of range.
    """
    given = dict(strength) if isinstance(strength, Mapping) else dict.fromkeys(names, strength)
    if unknown := [name for name in given if name not in names]:
        raise ExpertsError(f"strength is given for {unknown[0]!r}, the plan has phases {', '.join(names)}")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_STRENGTH:
            raise ExpertsError(
                f"strength of {name} is a number from -{MAX_STRENGTH} to {MAX_STRENGTH}, found {value!r}"
            )
    return {name: float(given.get(name, (others or {}).get(name, 1.0))) for name in names}


def _expert(name: str, source: LoraSource, component: str, strength: float) -> Expert:
    rank = max(source.ranks, default=1)
    weights = open_weights(source.path)
    beside = {float(weights.read(keys["alpha"])) for keys in source.modules.values() if "alpha" in keys}
    alpha = beside.pop() if len(beside) == 1 else source.alphas.every if not beside else None
    return Expert(
        name=name,
        file=f"{name}.safetensors",
        kind="lora",
        sha256=sha256_of(source.path),
        component=component,
        rank=rank,
        alpha=float(rank) if alpha is None else alpha,
        targets=tuple(sorted(source.modules))[:MAX_TARGETS],
        strength=strength,
    )

"""Experts folders in ComfyUI: where they are, and their experts as MODELs. Nothing that does not fit is passed over."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_detection
import comfy.model_management
import comfy.sd
import folder_paths
import torch

from ..pdmd_core.experts import MANIFEST_NAME, Expert, PhasedExperts
from ..pdmd_core.experts.convert.native import in_native_layout
from ..pdmd_core.experts.format.files import RELEASED
from ..pdmd_core.experts.format.fingerprint import Sampler, base_warning, sample_of
from ..pdmd_core.experts.format.weights import weights_of
from ..pdmd_core.families import FAMILIES, family
from ..pdmd_core.hashing import sha256_of
from .errors import NodeError
from .loaded import hold, key_of, loaded
from .loras import Lora, apply_lora

logger = logging.getLogger(__name__)

FOLDER = "phased_experts"
"""The kind of ComfyUI's model folders in which experts lie."""
FROM_HUB = "(Hub id)"
"""What users pick to load experts from the Hub."""
_REPOSITORY = Path(__file__).resolve().parents[1]


def register_folder() -> None:
    """Add ``models/phased_experts`` and, in a clone of this repository, what it ships or distils."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    for part in ("training", "runs"):
        if (_REPOSITORY / part).is_dir():
            folder_paths.add_model_folder_path(FOLDER, str(_REPOSITORY / part))


def _folders() -> dict[str, Path]:
    """Name, as users pick it, to folder; at most three levels deep. The first of equal names is used."""
    found: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths(FOLDER)):
        for pattern in ("*", "*/*", "*/*/*"):
            for manifest in sorted(root.glob(f"{pattern}/{MANIFEST_NAME}")):
                found.setdefault(manifest.parent.relative_to(root).as_posix(), manifest.parent)
    return found


def experts_names(hub: bool = False) -> list[str]:
    """List the folders to pick from."""
    return [*sorted(_folders()), *([FROM_HUB] if hub else [])]


def open_experts(name: str, hub_id: str = "") -> PhasedExperts:
    """Open a folder by its name, or experts of the Hub.

    Args:
        name: A name that ``experts_names`` lists.
        hub_id: The repository ``user/name``, where the name is ``FROM_HUB``.

    Returns:
        The opened experts.

    Raises:
        NodeError: If there is no such folder, or if the Hub cannot be asked.
        ExpertsError: If the experts are damaged.
    """
    if name == FROM_HUB:
        if not hub_id.strip():
            raise NodeError("give a Hub id (user/name) or pick an experts folder in models/phased_experts")
        try:
            return PhasedExperts.from_pretrained(hub_id.strip())
        except ImportError as error:
            raise NodeError(
                f"loading from the Hub needs the package huggingface_hub, which ComfyUI installs ({error}): install it "
                "into ComfyUI's Python, or download the folder into models/phased_experts"
            ) from None
    folder = _folders().get(name)
    if folder is None:
        raise NodeError(f"no experts folder {name!r}: put it, with its {MANIFEST_NAME}, into models/phased_experts")
    return PhasedExperts.open(folder)


def fingerprint(name: str) -> str:
    """Return a text that changes when the manifest does, which has the hashes of all files."""
    folder = _folders().get(name)
    if folder is None:
        return name
    hold(folder)  # ComfyUI asks before it drops what the node made
    return sha256_of(folder / MANIFEST_NAME)


def expert_model(
    experts: PhasedExperts,
    expert: Expert,
    bases: Mapping[str, Any],
    strength: float,
    warn: Callable[[str], None] = logger.warning,
    beside: bool = False,
) -> Any:
    """Make the MODEL of one expert.

    Args:
        experts: The opened experts.
        expert: The manifest's entry of the expert.
        bases: The base's MODELs by component, ``transformer`` and ``transformer_2``.
        strength: The strength of a LoRA expert, that of the manifest included.
        warn: Is told, in one line, which keys of a LoRA expert have no place in its base.
        beside: Whether products of a LoRA expert are computed beside the weights; they are merged otherwise.

    Returns:
        The MODEL.

    Raises:
        NodeError: If the base is missing or does not fit.
    """
    what = f"{expert.file} of {experts.folder.name}"
    base = bases.get(expert.component)
    if expert.kind == "full":
        return _full_model(experts, expert, base if base is not None else next(iter(bases.values()), None), what)
    if base is None:
        number = 2 if expert.component == "transformer_2" else 1
        raise NodeError(
            f"{what}: connect its base to base_{number}, which is the {expert.component} of "
            f"{experts.manifest.base.model}"
        )
    try:
        if RELEASED not in experts.manifest.training:
            warn = _refuse
        known = experts.manifest.base.family
        lora = Lora(experts.tensors(expert.name), experts.alphas(expert.name), what, expert.component, known)
        return apply_lora(base, lora, strength, warn, beside)
    except NodeError as error:
        origin = experts.manifest.base
        raise NodeError(f"{error}; these experts belong to {origin.model} ({origin.architecture})") from None


def _refuse(text: str) -> None:
    """Experts of this project fit their base as a whole."""
    raise NodeError(text)


def base_warnings(experts: PhasedExperts, bases: Mapping[str, Any]) -> list[str]:
    """Write a line for each base with other weights than the one that LoRA experts were distilled from."""
    origin, texts = experts.manifest.base, []
    for component in dict.fromkeys(expert.component for expert in experts.manifest.experts if expert.kind == "lora"):
        if component in bases:
            found = f"the MODEL of base_{2 if component == 'transformer_2' else 1}"
            texts.append(base_warning(origin, component, _sampler(bases[component], origin.family), found))
    return [text for text in texts if text]


def _sampler(model: Any, family_name: str) -> Sampler:
    """Sample a MODEL's weights as they are without what is patched onto it."""
    keys, weights = comfy.lora.model_lora_keys_unet(model.model, {}), model.model_state_dict()
    found = family(family_name) if family_name in FAMILIES else None
    layout = None if found is None else found.native_layout

    def place(name: str) -> Any:
        if layout is not None and (native := layout.find(name)) is not None:
            key = f"diffusion_model.{native.name}"
            key = key if key in weights else f"{key.removesuffix('.scale')}.weight"
            if key in weights and len(native.sources) > 1:
                unit, part = len(weights[key]) // sum(native.shares), native.sources.index(name)
                return key, (0, unit * sum(native.shares[:part]), unit * native.shares[part])
            return key
        with suppress(ValueError):  # ComfyUI itself knows where it is, or nobody
            name = name if found is None else found.native_weight_name(name)
        key = f"diffusion_model.{name}"
        return key if key in weights else keys.get(key.removesuffix(".weight"), key)

    def sample(name: str) -> torch.Tensor | None:
        at = place(name)
        key, part = (at, None) if isinstance(at, str) else (at[0], at[1])
        weight = model.backup[key].weight if key in model.backup else weights.get(key)
        return None if weight is None else sample_of(weight, *(part[1:] if part else ()))

    return sample


def _full_model(experts: PhasedExperts, expert: Expert, base: Any, what: str) -> Any:
    metadata = None
    if base is not None:  # sizes that a small network's shapes do not tell
        known = {key: value for key, value in base.model.model_config.unet_config.items() if _plain(value)}
        metadata = json.dumps({"transformer": known})
    key = key_of(experts.folder / expert.file, expert.sha256, metadata)
    return loaded(key, lambda: _read_full_model(experts, expert, metadata, what))


def _read_full_model(experts: PhasedExperts, expert: Expert, config: str | None, what: str) -> Any:
    state, base_name = experts.tensors(expert.name), experts.manifest.base.family
    try:
        native = in_native_layout(weights_of(state), family(base_name))
        state = {name: native.read(name) for name in native.specs}
    except ValueError:
        pass  # no family of ours, native names already, or a layout that ComfyUI itself converts: as it is
    metadata = None if config is None else {"config": config}
    try:
        model = comfy.sd.load_diffusion_model_state_dict(dict(state), metadata=metadata)
    except comfy.model_management.OOM_EXCEPTION:
        raise  # a RuntimeError for which ComfyUI frees memory
    except (RuntimeError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        hint = "" if config is not None else "; connect the base to base_1, which tells sizes that the file does not"
        raise NodeError(f"{what}: does not load: {' '.join(str(error).split())[:300]}{hint}") from None
    if model is None:
        raise NodeError(f"{what}: ComfyUI does not know this network ({experts.manifest.base.architecture})")
    names, given = set(model.model.diffusion_model.state_dict()), set(state)
    if names != given:
        given = _names_in_comfyui(state, model.model.model_config.process_unet_state_dict)
    if names != given:
        wrong = sorted(names ^ given)
        raise NodeError(f"{what}: {len(wrong)} weights are missing or unknown, for example {wrong[0]!r}")
    return model


def _names_in_comfyui(
    state: Mapping[str, Any], renamed: Callable[[dict[str, Any]], Mapping[str, Any]] = dict
) -> set[str]:
    """The names of weights after ComfyUI's own conversion from diffusers' layout and its renaming; others stay."""
    rest = {key: value.to("meta") for key, value in state.items()}
    found = comfy.model_detection.convert_diffusers_mmdit(rest, "") or {}
    return set(renamed({**found, **rest}))


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | list | tuple)

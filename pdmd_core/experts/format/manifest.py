"""The manifest of an experts folder: ``phased_experts.json``.

It says which base the experts belong to, the phase plan, and for each expert its file and what is in it. A manifest is
checked as a whole before any weight is touched. (Standard library only.)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ...phases import PhasePlan, PhasePlanError
from ..errors import ExpertsError
from .fields import are_bfloat16, are_sizes, check_field, check_object, is_json, is_number, is_text, matches
from .untrusted import MAX_JSON_BYTES, check_inside, parse_json, read_json, shown

FORMAT_VERSION = 1
"""The version of the format that this package writes, and the newest that it reads."""
MANIFEST_NAME = "phased_experts.json"
"""The file name of the manifest in an experts folder."""
MAX_MANIFEST_BYTES = MAX_JSON_BYTES
"""The most bytes of a manifest."""
MAX_RANK = 2**16
"""The largest rank of a LoRA expert."""
MAX_TARGETS = 10_000
"""The most target modules of a LoRA expert."""
MAX_SAMPLED_WEIGHTS, MAX_SAMPLED_VALUES = 200, 32
"""The most weights in a network's fingerprint, and the most values of each."""
MAX_STRENGTH = 10
"""The largest strength of a LoRA expert, of either sign, as for ComfyUI's loaders."""
MAX_GUIDANCE = 100
"""The largest guidance scale, as for ComfyUI's cfg."""

ExpertKind = Literal["lora", "full"]
"""Whether an expert is a LoRA on the base or a full copy of its network."""
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CLASS = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,119}")
_COMPONENT = re.compile(r"transformer(_[2-9])?")


@dataclass(frozen=True)
class BaseModel:
    """The model that the experts were distilled from."""

    model: str
    """The Hub id or folder name."""
    architecture: str
    """The class name of the network in diffusers."""
    family: str
    """The name in ``families.FAMILIES``."""
    revision: str | None = None
    """The branch, tag or commit on the Hub; None is the main branch."""
    fingerprints: Mapping[str, Mapping[str, str]] | None = None
    """Component to what ``fingerprint.take_fingerprint`` found in it: weight name to values in bfloat16, in base64."""


@dataclass(frozen=True)
class Expert:
    """One expert's file."""

    name: str
    """The name of the phase that it runs in."""
    file: str
    """The file name in the experts folder."""
    kind: ExpertKind
    """Whether the file holds a LoRA or a full network."""
    sha256: str
    """The SHA-256 of the file, 64 hexadecimal digits."""
    component: str = "transformer"
    """The base's component that it belongs to: transformer, or transformer_2 of a base with two networks."""
    rank: int | None = None
    """The rank of a LoRA expert; None for a full one."""
    alpha: float | None = None
    """The alpha of a LoRA expert, whose product is scaled by alpha / rank; None for a full one."""
    targets: tuple[str, ...] | None = None
    """Ends of the names of the modules that a LoRA expert adapts; None for a full one."""
    strength: float = 1.0
    """The factor of all that a LoRA expert changes; 1 is what was trained."""


@dataclass(frozen=True)
class Manifest:
    """What ``phased_experts.json`` holds.

    Raises:
        ExpertsError: If the parts do not fit each other.
    """

    base: BaseModel
    """The model that the experts were distilled from."""
    plan: PhasePlan
    """The plan that they were distilled for."""
    experts: tuple[Expert, ...]
    """One expert for each phase, in the same order."""
    guidance_scale: float = 1.0
    """The guidance at inference; 1 is none (the teacher's guidance is distilled into the experts)."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """A summary of the distillation: free-form JSON."""

    def __post_init__(self) -> None:
        """Check that there is one expert for each phase, each with a file of its own.

        Raises:
            ExpertsError: If the parts do not fit each other.
        """
        phases, experts = [p.name for p in self.plan.phases], [e.name for e in self.experts]
        if phases != experts:
            found = shown(", ".join(map(str, experts))) if experts else "none"
            raise ExpertsError(
                f"the plan has phases {shown(', '.join(phases))}, the experts are {found}: "
                "one expert for each phase, in the same order"
            )
        files = [expert.file for expert in self.experts]
        if len(set(files)) != len(files):
            raise ExpertsError(f"every expert has a file of its own, found {shown(', '.join(files))}")

    def expert(self, name: str) -> Expert:
        """Look up an expert.

        Args:
            name: The expert's name.

        Returns:
            Its entry.

        Raises:
            ExpertsError: If there is no expert of this name.
        """
        for expert in self.experts:
            if expert.name == name:
                return expert
        raise ExpertsError(f"no expert {shown(name)} here, expected one of: {', '.join(e.name for e in self.experts)}")

    def as_trained(self) -> Manifest:
        """Make the copy in each expert's file, which cannot hold its own hash, nor the strength that is set later.

        Returns:
            The manifest with zeros in place of the hashes, and strength 1.
        """
        return replace(self, experts=tuple(replace(e, sha256="0" * 64, strength=1.0) for e in self.experts))

    def to_dict(self) -> dict[str, Any]:
        """Write the manifest in its JSON form; numbers of ``training`` that are not finite become null.

        Returns:
            What ``from_dict`` reads back.
        """
        base = asdict(self.base)
        if base["fingerprints"] is None:
            del base["fingerprints"]
        return {
            "format_version": FORMAT_VERSION,
            "base": base,
            "plan": self.plan.to_dict(),
            "guidance_scale": self.guidance_scale,
            "experts": [_entry(expert) for expert in self.experts],
            "training": _finite(dict(self.training)),
        }

    def to_json(self) -> str:
        """Write the manifest as indented JSON text.

        Returns:
            ``to_dict`` as text.
        """
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, data: object) -> Manifest:
        """Read a manifest from its JSON form and check every field.

        Args:
            data: What ``to_dict`` returns.

        Returns:
            The manifest.

        Raises:
            ExpertsError: If a field is missing, unknown or not valid.
        """
        top = check_object(
            data,
            "the manifest",
            required={"format_version", "base", "plan", "experts"},
            optional={"guidance_scale", "training"},
        )
        try:
            plan = PhasePlan.from_dict(top["plan"])
        except PhasePlanError as error:
            raise ExpertsError(f"plan: {error}") from None
        base = check_object(top["base"], "base", {"model", "architecture", "family"}, {"revision", "fingerprints"})
        for key in ("model", "family"):
            check_field(
                base[key], f"base.{key}", "a text of 1 to 500 printable characters", lambda v: is_text(v) and bool(v)
            )
        check_field(base["architecture"], "base.architecture", "the name of a class", lambda v: matches(_CLASS, v))
        revision = base.get("revision")
        check_field(
            revision, "base.revision", "a text of printable characters or null", lambda v: v is None or is_text(v)
        )
        _check_fingerprints(base.get("fingerprints"))
        check_field(top["experts"], "experts", "a list", lambda v: isinstance(v, list))
        guidance = top.get("guidance_scale", 1.0)
        check_field(
            guidance,
            "guidance_scale",
            f"a number from 0 to {MAX_GUIDANCE}",
            lambda v: is_number(v) and 0 <= v <= MAX_GUIDANCE,
        )
        training = top.get("training", {})
        check_field(training, "training", "an object", lambda v: isinstance(v, dict))
        check_field(training, "training", "an object of JSON", is_json)
        size, length = training.get("size"), training.get("max_sequence_length")  # what is sampled by default
        three = "null or three whole numbers from 1 to 16384"
        check_field(
            size, "training.size", three, lambda v: v is None or (isinstance(v, list | tuple) and are_sizes(v, 3))
        )
        one = "null or a whole number from 1 to 16384"
        check_field(length, "training.max_sequence_length", one, lambda v: v is None or are_sizes([v], 1))
        return cls(
            base=BaseModel(**base),
            plan=plan,
            experts=tuple(_expert(entry, index) for index, entry in enumerate(top["experts"])),
            guidance_scale=float(guidance),
            training=training,
        )

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read a manifest from JSON text and check every field.

        Args:
            text: What ``to_json`` returns.

        Returns:
            The manifest.

        Raises:
            ExpertsError: If the text is not JSON or not that of a manifest.
        """
        try:
            data = parse_json(text)
        except ValueError as error:  # also for numbers of thousands of digits
            raise ExpertsError(f"the manifest is not JSON: {error}") from None
        return cls._of_json(data)

    @classmethod
    def _of_json(cls, data: object) -> Manifest:
        """Read parsed JSON; a newer format is reported first, since what else is in it is not known here."""
        version = data.get("format_version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ExpertsError(
                f"format_version is {shown(version)}, this program reads up to {FORMAT_VERSION}: upgrade phased-dmd"
            )
        if version != FORMAT_VERSION or not isinstance(version, int) or isinstance(version, bool):
            raise ExpertsError(f"format_version is {FORMAT_VERSION}, found {shown(version)}")
        return cls.from_dict(data)


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of an experts folder.

    Args:
        folder: The experts folder.

    Returns:
        The manifest.

    Raises:
        ExpertsError: If it is missing or not valid; the line starts with the path.
    """
    path = folder / MANIFEST_NAME
    if not folder.exists():
        raise ExpertsError(f"{folder}: no such folder; an experts folder holds {MANIFEST_NAME}")
    if not folder.is_dir():
        raise ExpertsError(f"{folder}: a file; give the experts folder, which holds {MANIFEST_NAME}")
    if not path.is_file():
        raise ExpertsError(f"{folder}: no {MANIFEST_NAME} here; give the experts/ folder that a distillation wrote")
    check_inside(path, folder)
    data = read_json(path, MAX_MANIFEST_BYTES)
    try:
        return Manifest._of_json(data)
    except ExpertsError as error:
        raise ExpertsError(f"{path}: {error}") from None


def _check_fingerprints(data: Any) -> None:
    where = "base.fingerprints"
    check_field(data, where, "an object or null", lambda v: v is None or isinstance(v, dict))
    for component, weights in (data or {}).items():
        check_field(component, f"a key of {where}", "transformer or transformer_N", lambda v: matches(_COMPONENT, v))
        check_field(
            weights,
            f"{where}.{component}",
            f"an object of 1 to {MAX_SAMPLED_WEIGHTS} weight names",
            lambda v: isinstance(v, dict) and 1 <= len(v) <= MAX_SAMPLED_WEIGHTS and all(map(is_text, v)),
        )
        expected = f"1 to {MAX_SAMPLED_VALUES} finite values of bfloat16 in base64"
        for name, values in weights.items():
            check_field(
                values, f"{where}.{component}[{shown(name)}]", expected, lambda v: are_bfloat16(v, MAX_SAMPLED_VALUES)
            )


def _expert(data: object, index: int) -> Expert:
    where = f"experts[{index}]"
    entry = check_object(
        data, where, {"name", "file", "kind", "sha256"}, {"component", "rank", "alpha", "targets", "strength"}
    )
    check_field(entry["name"], f"{where}.name", "a text of printable characters", is_text)
    check_field(
        entry["file"],
        f"{where}.file",
        "a plain file name that ends in .safetensors, without folders",
        lambda v: matches(_FILE, v),
    )
    check_field(entry["kind"], f"{where}.kind", "lora or full", lambda v: v in ("lora", "full"))
    check_field(
        entry["sha256"],
        f"{where}.sha256",
        "64 hexadecimal digits",
        lambda v: matches(_SHA256, v),
    )
    component = entry.get("component", "transformer")
    check_field(
        component,
        f"{where}.component",
        "transformer or transformer_N",
        lambda v: matches(_COMPONENT, v),
    )
    rank, alpha, targets = entry.get("rank"), entry.get("alpha"), entry.get("targets")
    strength = entry.get("strength", 1.0)
    check_field(
        strength,
        f"{where}.strength",
        f"a number from -{MAX_STRENGTH} to {MAX_STRENGTH}, and 1 for a full expert",
        lambda v: is_number(v) and -MAX_STRENGTH <= v <= MAX_STRENGTH and (v == 1 or entry["kind"] == "lora"),
    )
    if entry["kind"] == "lora":
        check_field(
            rank,
            f"{where}.rank",
            f"a whole number from 1 to {MAX_RANK}",
            lambda v: isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= MAX_RANK,
        )
        check_field(alpha, f"{where}.alpha", "a positive number", lambda v: is_number(v) and v > 0)
        check_field(
            targets,
            f"{where}.targets",
            f"a list of 1 to {MAX_TARGETS} module names",
            lambda v: isinstance(v, list) and 1 <= len(v) <= MAX_TARGETS and all(is_text(name) and name for name in v),
        )
    else:
        check_field(
            [rank, alpha, targets], where, "no rank, alpha or targets for a full expert", lambda v: v == [None] * 3
        )
    return Expert(
        name=entry["name"],
        file=entry["file"],
        kind=entry["kind"],
        sha256=entry["sha256"],
        component=component,
        rank=rank,
        alpha=float(alpha) if alpha is not None else None,
        targets=tuple(targets) if targets is not None else None,
        strength=float(strength),
    )


def _entry(expert: Expert) -> dict[str, Any]:
    """The JSON form of an expert; a strength of 1 is left out."""
    entry = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(expert).items()}
    if entry["strength"] == 1.0:
        del entry["strength"]
    return entry


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

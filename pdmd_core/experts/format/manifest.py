"""The manifest of an experts folder: ``phased_experts.json``.

It says which base the experts belong to, the phase plan, and for each expert its file and what is in it. A manifest is
checked as a whole before any weight is touched. (Standard library only.)
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ...phases import PhasePlan, PhasePlanError
from ..errors import ExpertsError
from .untrusted import MAX_JSON_BYTES, check_inside, parse_json, read_json, shown

FORMAT_VERSION = 1
MANIFEST_NAME = "phased_experts.json"
MAX_MANIFEST_BYTES = MAX_JSON_BYTES
MAX_RANK = 2**16
MAX_TARGETS = 10_000
MAX_SAMPLED_WEIGHTS, MAX_SAMPLED_VALUES = 200, 32
"""Of each network's fingerprint, and of each weight in it."""
MAX_GUIDANCE = 100
"""As ComfyUI's cfg."""

ExpertKind = Literal["lora", "full"]
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CLASS = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,119}")
_COMPONENT = re.compile(r"transformer(_[2-9])?")


@dataclass(frozen=True)
class BaseModel:
    """The model that the experts were distilled from."""

    model: str
    """Hub id or folder name."""
    architecture: str
    """Class name of the network in diffusers."""
    family: str
    """Name in ``families.FAMILIES``."""
    revision: str | None = None
    fingerprints: Mapping[str, Mapping[str, str]] | None = None
    """Component to what ``fingerprint.take_fingerprint`` found in it: weight name to values in bfloat16, in base64."""


@dataclass(frozen=True)
class Expert:
    """One expert's file. ``rank``, ``alpha`` and ``targets`` are set for LoRA experts only."""

    name: str
    file: str
    kind: ExpertKind
    sha256: str
    component: str = "transformer"
    """The base component it belongs to: transformer, or transformer_2 of a two-network base."""
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Manifest:
    """What ``phased_experts.json`` holds. Raises ExpertsError when the parts do not fit each other."""

    base: BaseModel
    plan: PhasePlan
    experts: tuple[Expert, ...]
    guidance_scale: float = 1.0
    """Guidance at inference; 1 is none (the teacher's guidance is distilled into the experts)."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Summary of the distillation: free-form JSON."""

    def __post_init__(self) -> None:
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
        """The entry of this name. Raises ExpertsError."""
        for expert in self.experts:
            if expert.name == name:
                return expert
        raise ExpertsError(f"no expert {shown(name)} here, expected one of: {', '.join(e.name for e in self.experts)}")

    def without_hashes(self) -> Manifest:
        """As each expert's file carries it: a file cannot hold its own hash."""
        return replace(self, experts=tuple(replace(expert, sha256="0" * 64) for expert in self.experts))

    def to_dict(self) -> dict[str, Any]:
        """JSON form; ``from_dict`` reads it back. Numbers of ``training`` that are not finite become null."""
        base = asdict(self.base)
        if base["fingerprints"] is None:
            del base["fingerprints"]
        return {
            "format_version": FORMAT_VERSION,
            "base": base,
            "plan": self.plan.to_dict(),
            "guidance_scale": self.guidance_scale,
            "experts": [
                {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(expert).items()}
                for expert in self.experts
            ],
            "training": _finite(dict(self.training)),
        }

    def to_json(self) -> str:
        """``to_dict`` as indented text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, data: object) -> Manifest:
        """Read and check every field. Raises ExpertsError."""
        top = _object(
            data,
            "the manifest",
            required={"format_version", "base", "plan", "experts"},
            optional={"guidance_scale", "training"},
        )
        try:
            plan = PhasePlan.from_dict(top["plan"])
        except PhasePlanError as error:
            raise ExpertsError(f"plan: {error}") from None
        base = _object(top["base"], "base", {"model", "architecture", "family"}, {"revision", "fingerprints"})
        for key in ("model", "family"):
            _check(base[key], f"base.{key}", "a text of 1 to 500 printable characters", lambda v: _text(v) and bool(v))
        _check(base["architecture"], "base.architecture", "the name of a class", lambda v: _matches(_CLASS, v))
        revision = base.get("revision")
        _check(revision, "base.revision", "a text of printable characters or null", lambda v: v is None or _text(v))
        _check_fingerprints(base.get("fingerprints"))
        _check(top["experts"], "experts", "a list", lambda v: isinstance(v, list))
        guidance = top.get("guidance_scale", 1.0)
        _check(
            guidance,
            "guidance_scale",
            f"a number from 0 to {MAX_GUIDANCE}",
            lambda v: _number(v) and 0 <= v <= MAX_GUIDANCE,
        )
        training = top.get("training", {})
        _check(training, "training", "an object", lambda v: isinstance(v, dict))
        _check(training, "training", "an object of JSON", _is_json)
        size, length = training.get("size"), training.get("max_sequence_length")  # what is sampled by default
        three = "null or three whole numbers from 1 to 16384"
        _check(size, "training.size", three, lambda v: v is None or (isinstance(v, list | tuple) and _are_sizes(v, 3)))
        one = "null or a whole number from 1 to 16384"
        _check(length, "training.max_sequence_length", one, lambda v: v is None or _are_sizes([v], 1))
        return cls(
            base=BaseModel(**base),
            plan=plan,
            experts=tuple(_expert(entry, index) for index, entry in enumerate(top["experts"])),
            guidance_scale=float(guidance),
            training=training,
        )

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Inverse of ``to_json``. Raises ExpertsError."""
        try:
            data = parse_json(text)
        except ValueError as error:  # also for numbers of thousands of digits
            raise ExpertsError(f"the manifest is not JSON: {error}") from None
        return cls._of_json(data)

    @classmethod
    def _of_json(cls, data: object) -> Manifest:
        """A newer format is told first: what else is in it is not known here."""
        version = data.get("format_version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ExpertsError(
                f"format_version is {shown(version)}, this program reads up to {FORMAT_VERSION}: upgrade phased-dmd"
            )
        if version != FORMAT_VERSION or not isinstance(version, int) or isinstance(version, bool):
            raise ExpertsError(f"format_version is {FORMAT_VERSION}, found {shown(version)}")
        return cls.from_dict(data)


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``folder/phased_experts.json``. Raises ExpertsError with the folder in front."""
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise ExpertsError(f"{folder}: no such folder; an experts folder holds {MANIFEST_NAME}")
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
    _check(data, where, "an object or null", lambda v: v is None or isinstance(v, dict))
    for component, weights in (data or {}).items():
        _check(component, f"a key of {where}", "transformer or transformer_N", lambda v: _matches(_COMPONENT, v))
        _check(
            weights,
            f"{where}.{component}",
            f"an object of 1 to {MAX_SAMPLED_WEIGHTS} weight names",
            lambda v: isinstance(v, dict) and 1 <= len(v) <= MAX_SAMPLED_WEIGHTS and all(map(_text, v)),
        )
        expected = f"1 to {MAX_SAMPLED_VALUES} finite values of bfloat16 in base64"
        for name, values in weights.items():
            _check(values, f"{where}.{component}[{shown(name)}]", expected, _is_sample)


def _is_sample(value: object) -> bool:
    if not isinstance(value, str) or len(value) > 4 * MAX_SAMPLED_VALUES:
        return False
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return False
    if not data or len(data) % 2 or len(data) > 2 * MAX_SAMPLED_VALUES:
        return False
    return all(number & 0x7F80 != 0x7F80 for number in struct.unpack(f"<{len(data) // 2}H", data))


def _expert(data: object, index: int) -> Expert:
    where = f"experts[{index}]"
    entry = _object(data, where, {"name", "file", "kind", "sha256"}, {"component", "rank", "alpha", "targets"})
    _check(entry["name"], f"{where}.name", "a text of printable characters", _text)
    _check(
        entry["file"],
        f"{where}.file",
        "a plain file name that ends in .safetensors, without folders",
        lambda v: _matches(_FILE, v),
    )
    _check(entry["kind"], f"{where}.kind", "lora or full", lambda v: v in ("lora", "full"))
    _check(
        entry["sha256"],
        f"{where}.sha256",
        "64 hexadecimal digits",
        lambda v: _matches(_SHA256, v),
    )
    component = entry.get("component", "transformer")
    _check(
        component,
        f"{where}.component",
        "transformer or transformer_N",
        lambda v: _matches(_COMPONENT, v),
    )
    rank, alpha, targets = entry.get("rank"), entry.get("alpha"), entry.get("targets")
    if entry["kind"] == "lora":
        _check(
            rank,
            f"{where}.rank",
            f"a whole number from 1 to {MAX_RANK}",
            lambda v: isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= MAX_RANK,
        )
        _check(alpha, f"{where}.alpha", "a positive number", lambda v: _number(v) and v > 0)
        _check(
            targets,
            f"{where}.targets",
            f"a list of 1 to {MAX_TARGETS} module names",
            lambda v: isinstance(v, list) and 1 <= len(v) <= MAX_TARGETS and all(_text(name) and name for name in v),
        )
    else:
        _check([rank, alpha, targets], where, "no rank, alpha or targets for a full expert", lambda v: v == [None] * 3)
    return Expert(
        name=entry["name"],
        file=entry["file"],
        kind=entry["kind"],
        sha256=entry["sha256"],
        component=component,
        rank=rank,
        alpha=float(alpha) if alpha is not None else None,
        targets=tuple(targets) if targets is not None else None,
    )


def _object(data: object, what: str, required: set[str], optional: set[str]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ExpertsError(f"{what} is an object, found {type(data).__name__}")
    missing, unknown = required - set(data), set(data) - required - optional
    if missing:
        raise ExpertsError(f"{what} lacks {', '.join(sorted(missing))}")
    if unknown:
        first, *others = sorted(map(shown, unknown))
        more = f" and {len(others)} more" if others else ""
        raise ExpertsError(f"{what} has unknown field(s) {first}{more}: remove or upgrade")
    return data


def _check(value: object, where: str, expected: str, accept: Callable[[Any], bool]) -> None:
    if not accept(value):
        raise ExpertsError(f"{where} is {expected}, found {shown(value)}")


def _text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= 500


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and bool(pattern.fullmatch(value))


def _are_sizes(values: Sequence[object], count: int) -> bool:
    return len(values) == count and all(type(value) is int and 1 <= value <= 2**14 for value in values)


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False

"""The manifest of an experts folder: ``phased_experts.json``.

It says which base the experts belong to, the phase plan, and for each expert its file and what is in it. A manifest is
checked as a whole before any weight is touched. (Standard library only.)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..phases import PhasePlan, PhasePlanError

FORMAT_VERSION = 1
MANIFEST_NAME = "phased_experts.json"
MAX_MANIFEST_BYTES = 4 * 2**20

ExpertKind = Literal["lora", "full"]
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMPONENT = re.compile(r"transformer(_[2-9])?")


class ExpertsError(ValueError):
    """An experts folder that cannot be used: one line with what was expected, what was found and what to do."""


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
            found = ", ".join(map(repr, experts)) or "none"
            raise ExpertsError(
                f"the plan has phases {', '.join(phases)}, the experts are {found}: "
                "one expert for each phase, in the same order"
            )
        files = [expert.file for expert in self.experts]
        if len(set(files)) != len(files):
            raise ExpertsError(f"every expert has a file of its own, found {', '.join(files)}")

    def expert(self, name: str) -> Expert:
        """The entry of this name. Raises ExpertsError."""
        for expert in self.experts:
            if expert.name == name:
                return expert
        raise ExpertsError(f"no expert {name!r} here, expected one of: {', '.join(e.name for e in self.experts)}")

    def to_dict(self) -> dict[str, Any]:
        """JSON form; ``from_dict`` reads it back."""
        return {
            "format_version": FORMAT_VERSION,
            "base": asdict(self.base),
            "plan": self.plan.to_dict(),
            "guidance_scale": self.guidance_scale,
            "experts": [
                {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(expert).items()}
                for expert in self.experts
            ],
            "training": dict(self.training),
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
        base = _object(top["base"], "base", {"model", "architecture", "family"}, {"revision"})
        for key in ("model", "architecture", "family"):
            _check(base[key], f"base.{key}", "a non-empty text", lambda v: isinstance(v, str) and bool(v))
        _check(base.get("revision"), "base.revision", "a text or null", lambda v: v is None or isinstance(v, str))
        _check(top["experts"], "experts", "a list", lambda v: isinstance(v, list))
        guidance = top.get("guidance_scale", 1.0)
        _check(guidance, "guidance_scale", "a number of at least 0", lambda v: _number(v) and v >= 0)
        training = top.get("training", {})
        _check(training, "training", "an object", lambda v: isinstance(v, dict))
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
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
            raise ExpertsError(f"the manifest is not JSON: {error}") from None
        version = data.get("format_version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ExpertsError(
                f"format_version is {version}, this program reads up to {FORMAT_VERSION}: upgrade phased-dmd"
            )
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise ExpertsError(f"format_version is {FORMAT_VERSION}, found {version!r}")
        return cls.from_dict(data)


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``folder/phased_experts.json``. Raises ExpertsError with the folder in front."""
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise ExpertsError(f"{folder}: no such folder; an experts folder holds {MANIFEST_NAME}")
    if not path.is_file():
        raise ExpertsError(f"{folder}: no {MANIFEST_NAME} here; give the experts/ folder that a distillation wrote")
    size = path.stat().st_size
    if size > MAX_MANIFEST_BYTES:
        raise ExpertsError(f"{path}: {size} bytes, a manifest has at most {MAX_MANIFEST_BYTES}")
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ExpertsError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except ExpertsError as error:
        raise ExpertsError(f"{path}: {error}") from None


def _expert(data: object, index: int) -> Expert:
    where = f"experts[{index}]"
    entry = _object(data, where, {"name", "file", "kind", "sha256"}, {"component", "rank", "alpha", "targets"})
    _check(entry["name"], f"{where}.name", "a text", lambda v: isinstance(v, str))
    _check(
        entry["file"],
        f"{where}.file",
        "a plain file name that ends in .safetensors, without folders",
        lambda v: isinstance(v, str) and bool(_FILE.fullmatch(v)),
    )
    _check(entry["kind"], f"{where}.kind", "lora or full", lambda v: v in ("lora", "full"))
    _check(
        entry["sha256"],
        f"{where}.sha256",
        "64 hexadecimal digits",
        lambda v: isinstance(v, str) and bool(_SHA256.fullmatch(v)),
    )
    component = entry.get("component", "transformer")
    _check(
        component,
        f"{where}.component",
        "transformer or transformer_N",
        lambda v: isinstance(v, str) and bool(_COMPONENT.fullmatch(v)),
    )
    rank, alpha, targets = entry.get("rank"), entry.get("alpha"), entry.get("targets")
    if entry["kind"] == "lora":
        _check(
            rank,
            f"{where}.rank",
            "a whole number of at least 1",
            lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1,
        )
        _check(alpha, f"{where}.alpha", "a positive number", lambda v: _number(v) and v > 0)
        _check(
            targets,
            f"{where}.targets",
            "a list of module names",
            lambda v: isinstance(v, list) and bool(v) and all(isinstance(name, str) for name in v),
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
        raise ExpertsError(f"{what} has unknown field(s) {', '.join(sorted(map(repr, unknown)))}: remove or upgrade")
    return data


def _check(value: object, where: str, expected: str, accept: Callable[[Any], bool]) -> None:
    if not accept(value):
        shown = repr(value)
        raise ExpertsError(f"{where} is {expected}, found {shown if len(shown) < 80 else shown[:77] + '...'}")


def _number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False

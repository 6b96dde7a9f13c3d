"""Whether LoRA files are in the slots of the phases that they were distilled for: by what they carry, or by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..pdmd_core.experts.format.files import read_expert_metadata
from ..pdmd_core.phases import PhasePlan
from ..pdmd_core.sampling import TRAINED_TOLERANCE

_ENDS = {"high": "high", "low": "low", "\u9ad8\u566a": "high", "\u4f4e\u566a": "low"}
_WORD = re.compile(r"(?<![a-z])(?:high|low)(?![a-z])|\u9ad8\u566a|\u4f4e\u566a")


def slot_warnings(plan: PhasePlan, files: Sequence[str | None], metadata: Sequence[Mapping[str, str]]) -> list[str]:
    """Say which LoRA files belong elsewhere.

    Args:
        plan: The plan that they run under.
        files: The file of each phase; None where there is none.
        metadata: The metadata of each of these files.

    Returns:
        Sentences, what to do first. Experts of this project carry the plan that they were distilled for; of other
        files only a name with "low" before one with "high" tells.
    """
    warnings = []
    for k, (file, carried) in enumerate(zip(files, metadata, strict=True)):
        own = _sigmas(carried)
        if file is None or own is None or _same(own, plan.phases[k].sigmas):
            continue
        fits = [n for n, phase in enumerate(plan.phases) if _same(own, phase.sigmas)]
        sigmas = ", ".join(f"{sigma:.4g}" for sigma in own)
        if fits:
            warnings.append(
                f"put {file} into lora_{fits[0] + 1}: it was distilled for the sigmas {sigmas} of that phase"
            )
        else:
            warnings.append(f"connect the plan of {file}: it was distilled for the sigmas {sigmas}, which no phase has")
    ends = [_end(file) if file is not None else None for file in files]
    if not warnings and "low" in ends and "high" in ends[ends.index("low") :]:
        low, high = ends.index("low"), ends.index("high", ends.index("low"))
        warnings.append(f"exchange {files[low]} and {files[high]}, by their names: high noise comes first")
    return warnings


def _sigmas(metadata: Mapping[str, str]) -> tuple[float, ...] | None:
    try:
        manifest, expert = read_expert_metadata(metadata)
    except ValueError:
        return None
    return next(phase.sigmas for phase in manifest.plan.phases if phase.name == expert.name)


def _same(some: Sequence[float], others: Sequence[float]) -> bool:
    return len(some) == len(others) and all(
        abs(a - b) <= TRAINED_TOLERANCE * b for a, b in zip(some, others, strict=True)
    )


def _end(name: str) -> str | None:
    found = set(_WORD.findall(name.lower()))
    return _ENDS[found.pop()] if len(found) == 1 else None

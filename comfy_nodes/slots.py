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
    own = [_sigmas(carried) for carried in metadata]
    places = [[n + 1 for n, phase in enumerate(plan.phases) if each and _same(each, phase.sigmas)] for each in own]
    wrong = [k for k, each in enumerate(own, start=1) if each and k not in places[k - 1]]
    if len(wrong) == 2 and places[wrong[0] - 1] == wrong[1:] and places[wrong[1] - 1] == wrong[:1]:
        return [f"exchange lora_{wrong[0]} and lora_{wrong[1]}: each was distilled for the phase of the other"]
    warnings = []
    for k in wrong:
        sigmas = f"it was distilled for the sigmas {', '.join(f'{sigma:.4g}' for sigma in own[k - 1] or ())}"
        if places[k - 1]:
            warnings.append(f"move lora_{k} to lora_{places[k - 1][0]}: {sigmas}")
        else:
            warnings.append(f"connect the plan of lora_{k}: {sigmas}")
    ends = [_end(file) if file is not None else None for file in files]
    if not wrong and "low" in ends and "high" in ends[ends.index("low") :]:
        low = ends.index("low")
        high = ends.index("high", low)
        warnings.append(f"exchange lora_{low + 1} and lora_{high + 1}: high noise comes first, say their names")
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

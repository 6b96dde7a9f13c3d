"""The grammar of keys in LoRA files: ``<module><suffix>``, with many suffixes for few meanings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

_ADAPTER = r"(?:\.(?!weight$|bias$)[\w-]+)?"
"""The name of an adapter, as in ``lora_A.default.weight``."""
_SUFFIXES = {
    "down": rf"\.lora_A{_ADAPTER}(?:\.weight)?|\.lora_down\.weight|\.lora(?:_linear_layer)?\.down\.weight",
    "up": rf"\.lora_B{_ADAPTER}(?:\.weight)?|\.lora_up\.weight|\.lora(?:_linear_layer)?\.up\.weight",
    "up bias": rf"\.lora_B{_ADAPTER}\.bias|\.lora_up\.bias",
    "middle": r"\.lora_mid\.weight",
    "alpha": r"\.alpha",
    "weight difference": r"\.diff|\.w_norm",
    "bias difference": r"\.diff_b|\.b_norm",
    "modulation difference": r"\.diff_m",
    "DoRA": rf"\.dora_scale|\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?",
    "new weight": r"\.set_weight",
    "new shape": r"\.reshape_weight",
    **{f"LoKr {part}": rf"\.lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f"LoHa {part}": rf"\.hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
}
"""Meaning to the pattern of the suffixes that have it."""
_KEY = re.compile(r"(?P<module>.+?)(?:" + "|".join(f"(?P<m{n}>{p})" for n, p in enumerate(_SUFFIXES.values())) + ")")
MEANINGS = tuple(_SUFFIXES)
"""All meanings that a suffix may have."""


def split_key(key: str) -> tuple[str, str] | None:
    """Split a key into module and meaning.

    Args:
        key: A key of a LoRA file.

    Returns:
        The module with its prefix, and one of ``MEANINGS``; None where the key has no suffix of a LoRA file.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    return match["module"], next(name for n, name in enumerate(MEANINGS) if match[f"m{n}"] is not None)


def by_module(values: Mapping[str, T]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Group the keys of a file.

    Args:
        values: Anything by the keys of the file.

    Returns:
        Module to meaning to key, and the keys that are not understood.
    """
    modules: dict[str, dict[str, str]] = {}
    others = []
    for key in values:
        found = split_key(key)
        if found is None or found[1] in modules.get(found[0], {}):
            others.append(key)
        else:
            modules.setdefault(found[0], {})[found[1]] = key
    return modules, others


def summary(keys: Iterable[str]) -> str:
    """Name keys in short: modules that differ in numbers alone are named once, each with its suffixes.

    Args:
        keys: Keys of a LoRA file.

    Returns:
        For example ``blocks.*.cross_attn.k_img.lora_A.weight|lora_B.weight (80), head.diff``.
    """
    kinds: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    for key in keys:
        found = split_key(key)
        module = found[0] if found else key
        kind, suffix = re.sub(r"(?<=[._])\d+(?=[._]|$)", "*", module), key.removeprefix(module).strip(".")
        counts[kind] += 1
        if suffix not in kinds.setdefault(kind, []):
            kinds[kind].append(suffix)
    return ", ".join(
        (f"{kind}.{'|'.join(suffixes)}" if suffixes != [""] else kind)
        + (f" ({counts[kind]})" if counts[kind] > 1 else "")
        for kind, suffixes in kinds.items()
    )

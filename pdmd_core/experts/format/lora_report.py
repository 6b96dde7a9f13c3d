"""What a LoRA file of any program is, as its keys and its metadata tell: layout, rank, alpha, family."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...families import family_of_lora
from .untrusted import parse_json
from .weights import Weights

_PARTS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
    ".diff": "difference",
    ".diff_b": "difference",
    ".dora_scale": "DoRA scale",
}
_PREFIXES = {
    "diffusion_model.": "original module names, as ComfyUI and diffusers read them",
    "lora_unet_": "kohya's flattened original names, as ComfyUI reads them",
    "transformer.": "diffusers' names for its load_lora_weights",
    "transformer_2.": "diffusers' names for a second network, which load_lora_weights ignores",
    "base_model.model.": "PEFT's names, which neither ComfyUI nor diffusers' load_lora_weights reads for every model",
    "": "bare module names",
}
_BLOCK = re.compile(r"(?:^|[._])blocks[._](\d+)[._]")


def lora_report(weights: Weights, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Tell format, rank, alpha and family of a LoRA file.

    Args:
        weights: The file's tensors, of which only those of alpha are read.
        metadata: What the file's header says beside its tensors.

    Returns:
        Nothing when no key is a LoRA's. ``modules``, ``unpaired_modules`` (those without both projections),
        ``other_keys`` and ``blocks`` are numbers; ``ranks`` and ``alphas`` are all that occur, sorted; ``prefix``,
        ``layout`` and ``parts`` say how keys are named; ``alpha_in_metadata`` and ``family`` are None where nothing
        tells.
    """
    parts: dict[str, Counter[str]] = {}
    for name in weights.specs:
        suffix = next((suffix for suffix in _PARTS if name.endswith(suffix)), None)
        if suffix:
            parts.setdefault(name.removesuffix(suffix), Counter())[suffix] += 1
    modules = [module for module, found in parts.items() if any(_PARTS[s] in ("down", "up") for s in found)]
    if not modules:
        return {}
    prefixes = Counter(next(prefix for prefix in _PREFIXES if module.startswith(prefix)) for module in modules)
    prefix = prefixes.most_common(1)[0][0]
    downs = [n for n in weights.specs if _PARTS.get(_suffix(n)) == "down"]
    alphas = [n for n in weights.specs if n.endswith(".alpha")]
    found_family = family_of_lora(modules)
    return {
        "what": "LoRA",
        "modules": len(modules),
        "prefix": prefix,
        "layout": _PREFIXES[prefix] + (", and others" if len(prefixes) > 1 else ""),
        "parts": sorted({_suffix(name) for name in weights.specs} - {""}),
        "unpaired_modules": sum(not {"down", "up"} <= {_PARTS[s] for s in parts[m]} for m in modules),
        "other_keys": sum(not _suffix(name) for name in weights.specs),
        "ranks": sorted({weights.specs[name].shape[0] for name in downs if weights.specs[name].shape}),
        "alphas": sorted({float(weights.read(name)) for name in alphas if weights.specs[name].numel == 1}),
        "alpha_in_metadata": _peft_alpha(metadata),
        "blocks": len({match[1] for module in modules if (match := _BLOCK.search(module))}),
        "family": found_family.name if found_family else None,
    }


def _suffix(name: str) -> str:
    return next((suffix for suffix in _PARTS if name.endswith(suffix)), "")


def _peft_alpha(metadata: Mapping[str, str]) -> list[float] | None:
    """Alpha as diffusers writes it beside a LoRA, which ComfyUI does not read."""
    try:
        found = parse_json(metadata.get("lora_adapter_metadata", "{}"))
        return sorted({float(value) for key, value in found.items() if key.endswith("lora_alpha")}) or None
    except (ValueError, TypeError, AttributeError):
        return None

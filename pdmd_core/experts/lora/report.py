"""What a LoRA file of any program is, as its keys and its metadata tell: layout, rank, alpha, family."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from ...families import family_of_lora
from ..errors import ExpertsError
from ..format.weights import Weights
from .alpha import alphas_in
from .keys import by_module

_PREFIXES = {
    "diffusion_model.": "original module names, as ComfyUI and diffusers read them",
    "lora_unet_": "kohya's flattened original names, as ComfyUI reads them",
    "transformer.": "diffusers' names for its load_lora_weights",
    "transformer_2.": "diffusers' names for a second network, which load_lora_weights ignores",
    "base_model.model.": "PEFT's names, which neither ComfyUI nor diffusers' load_lora_weights reads for every model",
    "": "bare module names",
}
_BLOCK = re.compile(r"(?:^|[._])blocks[._](\d+)[._]")


def lora_report(weights: Weights, metadata: Mapping[str, str]) -> dict[str, object]:
    """Tell format, rank, alpha and family of a LoRA file.

    Args:
        weights: The file's tensors, of which only those of alpha are read.
        metadata: What the file's header says beside its tensors.

    Returns:
        Nothing when no key is a LoRA's. ``modules``, ``unpaired_modules`` (those with one of the two projections),
        ``differences`` (weights and biases that change by a plain difference), ``other_keys`` and ``blocks`` are
        numbers; ``ranks`` and ``alphas`` are all that occur, sorted; ``prefix``, ``layout`` and ``parts`` say how keys
        are named; ``alpha_in_metadata`` and ``family`` are None where nothing tells.
    """
    modules, others = by_module(weights.specs)
    known = {module: keys for module, keys in modules.items() if set(keys) - {"alpha"}}
    if not known:
        return {}
    prefixes = Counter(next(prefix for prefix in _PREFIXES if module.startswith(prefix)) for module in known)
    prefix = prefixes.most_common(1)[0][0]
    downs = [weights.specs[keys["down"]].shape for keys in known.values() if "down" in keys]
    alphas = [keys["alpha"] for keys in modules.values() if "alpha" in keys]
    suffixes = {key.removeprefix(module) for module, keys in modules.items() for key in keys.values()}
    found = family_of_lora(list(known))
    return {
        "what": "LoRA",
        "modules": len(known),
        "prefix": prefix,
        "layout": _PREFIXES[prefix] + (", and others" if len(prefixes) > 1 else ""),
        "parts": sorted(suffixes),
        "unpaired_modules": sum(len({"down", "up"} & set(keys)) == 1 for keys in known.values()),
        "differences": sum(meaning.endswith("difference") for keys in known.values() for meaning in keys),
        "other_keys": len(others),
        "ranks": sorted({shape[0] for shape in downs if shape}),
        "alphas": sorted({float(weights.read(name)) for name in alphas if weights.specs[name].numel == 1}),
        "alpha_in_metadata": _alpha_in(metadata),
        "blocks": len({match[1] for module in known if (match := _BLOCK.search(module))}),
        "family": found.name if found else None,
    }


def _alpha_in(metadata: Mapping[str, str]) -> list[float] | None:
    """Alpha beside a LoRA's tensors, which ComfyUI does not read; nothing where that is not one positive number."""
    try:
        alphas = alphas_in(metadata)
    except ExpertsError:
        return None
    return sorted({*([] if alphas.every is None else [alphas.every]), *alphas.of_module.values()}) or None

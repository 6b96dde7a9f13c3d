"""What an experts folder or a single safetensors file is, told from manifest and headers alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..families import FAMILIES, family
from .files import METADATA_KEY, PhasedExperts, read_expert_metadata
from .header import read_header
from .manifest import ExpertsError, Manifest
from .output import in_units
from .untrusted import parse_json
from .weights import Weights, dtype_name, open_weights

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


def inspect(path: Path) -> dict[str, Any]:
    """A report that ``json.dumps`` takes and ``report_text`` prints. Raises ExpertsError.

    path: an experts folder; or a file: an expert's, another program's LoRA, or weights of any kind.
    """
    if path.is_dir():
        experts = PhasedExperts.open(path)
        return _manifest_report(experts.manifest, path, {e.name: path / e.file for e in experts.manifest.experts})
    if path.suffix != ".safetensors":
        what = "only safetensors files and experts folders are read" if path.exists() else "no such file or folder"
        raise ExpertsError(f"{path}: {what}")
    weights, metadata = open_weights(path), read_header(path).metadata
    if METADATA_KEY in metadata:
        return _expert_file_report(path, metadata)
    report = {"what": "weights", "path": str(path), **_contents(weights), "metadata": _short(metadata)}
    return report | lora_report(weights, metadata)


def _manifest_report(manifest: Manifest, path: Path, files: dict[str, Path]) -> dict[str, Any]:
    entries = []
    for expert in manifest.experts:
        entry: dict[str, Any] = {"name": expert.name, "file": expert.file, "kind": expert.kind}
        entry |= {"component": expert.component, "rank": expert.rank, "alpha": expert.alpha}
        if expert.name in files:
            entry |= _contents(open_weights(files[expert.name]))
        entries.append(entry)
    return {
        "what": "experts",
        "path": str(path),
        "base": manifest.to_dict()["base"],
        "plan": manifest.plan.to_dict(),
        "plan_table": manifest.plan.describe(),
        "guidance_scale": manifest.guidance_scale,
        "experts": entries,
        "training": dict(manifest.training),
    }


def _expert_file_report(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        manifest, expert = read_expert_metadata(metadata)
    except ValueError as error:
        raise ExpertsError(f"{path}: its metadata is not that of a phased expert ({error})") from None
    report = _manifest_report(manifest, path, {expert.name: path})
    own = [entry for entry in report["experts"] if entry["name"] == expert.name]
    return report | {"what": "expert", "expert": expert.name, "experts": own}


def _contents(weights: Weights) -> dict[str, Any]:
    """Counts over all tensors, the scalars that hold a LoRA's alpha left out of the parameters."""
    counted = [spec for name, spec in weights.specs.items() if not name.endswith(".alpha")]
    dtypes = Counter({dtype_name(spec.dtype): 0 for spec in counted})
    for spec in counted:
        dtypes[dtype_name(spec.dtype)] += spec.numel
    return {
        "tensors": len(weights.specs),
        "parameters": sum(dtypes.values()),
        "bytes": weights.nbytes,
        "dtypes": [name for name, _ in dtypes.most_common()],
        "first_keys": sorted(weights.specs)[:3],
    }


def lora_report(weights: Weights, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Format, rank and alpha of a LoRA; nothing when no key is one's."""
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
    bare = [module.removeprefix(prefix) for module in modules]
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
        "family": next((name for name in FAMILIES if all(_is_native(name, module) for module in bare)), None),
    }


def _suffix(name: str) -> str:
    return next((suffix for suffix in _PARTS if name.endswith(suffix)), "")


def _is_native(name: str, module: str) -> bool:
    try:
        family(name).diffusers_module_name(module)
    except ValueError:
        return False
    return True


def _peft_alpha(metadata: Mapping[str, str]) -> list[float] | None:
    """What diffusers writes beside a LoRA and ComfyUI does not read."""
    try:
        found = parse_json(metadata.get("lora_adapter_metadata", "{}"))
        return sorted({float(value) for key, value in found.items() if key.endswith("lora_alpha")}) or None
    except (ValueError, TypeError, AttributeError):
        return None


def _short(metadata: Mapping[str, str]) -> dict[str, str]:
    """Cut, and without what a terminal would obey."""
    return {_plain(key): _plain(value if len(value) <= 200 else value[:197] + "...") for key, value in metadata.items()}


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def report_text(report: dict[str, Any]) -> str:
    """The report for people."""
    if report["what"] in ("experts", "expert"):
        return _experts_text(report)
    rows = [("what", report["what"]), ("file", report["path"])]
    if report["what"] == "LoRA":
        alphas = ", ".join(f"{alpha:g}" for alpha in report["alphas"])
        if not alphas and report["alpha_in_metadata"]:
            inside = ", ".join(f"{alpha:g}" for alpha in report["alpha_in_metadata"])
            alphas = f"{inside} in the metadata only: diffusers reads it, ComfyUI does not"
        blocks = f" in {report['blocks']} blocks" if report["blocks"] else ""
        rows += [
            ("keys", f"{report['prefix']}<module>{'|'.join(report['parts'])}"),
            ("layout", report["layout"]),
            ("modules", f"{report['modules']}{blocks}" + (f" of {report['family']}" if report["family"] else "")),
            ("rank", ", ".join(map(str, report["ranks"]))),
            ("alpha", alphas or "none: the same as the rank"),
        ]
        if report["unpaired_modules"]:
            rows.append(("unpaired", f"{report['unpaired_modules']} module(s) lack one half of the product"))
        if report["other_keys"]:
            rows.append(("other keys", f"{report['other_keys']} that are no LoRA's"))
    rows += [
        ("size", _size(report)),
        ("first keys", "\n".join(report["first_keys"])),
        ("metadata", "\n".join(f"{key}: {value}" for key, value in report["metadata"].items()) or "none"),
    ]
    return _table(rows)


def _experts_text(report: dict[str, Any]) -> str:
    base = report["base"]
    single = report["what"] == "expert"
    revision = f" at {base['revision']}" if base["revision"] else ""
    rows = [
        ("what", f"expert {report['expert']} of a phased distillation" if single else "phased experts"),
        ("file" if single else "folder", report["path"]),
        ("base", f"{base['model']}{revision} ({base['architecture']}, family {base['family']})"),
        ("guidance", f"{report['guidance_scale']:g}" + (" (none)" if report["guidance_scale"] == 1 else "")),
        ("plan", report["plan_table"]),
    ]
    for entry in report["experts"]:
        lora = f", rank {entry['rank']}, alpha {entry['alpha']:g}" if entry["kind"] == "lora" else ""
        place = "" if entry["component"] == "transformer" else f" of {entry['component']}"
        rows.append((entry["name"], f"{entry['kind']}{place}{lora}, {_size(entry)}, {entry['file']}"))
    if single:
        rows.append(("first keys", "\n".join(report["experts"][0]["first_keys"])))
    rows.append(("training", json.dumps(report["training"], indent=2) if report["training"] else "nothing is noted"))
    return _table(rows)


def _size(entry: dict[str, Any]) -> str:
    dtypes = ", ".join(entry["dtypes"])
    return f"{entry['parameters']:,} parameters, {entry['tensors']} tensors, {in_units(entry['bytes'])} in {dtypes}"


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(name.ljust(width) + text.replace("\n", "\n" + " " * width) for name, text in rows)

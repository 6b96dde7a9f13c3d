"""What an experts folder or a single safetensors file is, from manifest and headers alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .convert.output import in_units
from .errors import ExpertsError
from .folder import PhasedExperts
from .format.files import METADATA_KEY, read_expert_metadata
from .format.header import read_header
from .format.manifest import Manifest
from .format.weights import Weights, dtype_name, open_weights
from .lora.report import lora_report


def inspect(path: Path) -> dict[str, Any]:
    """Report what a folder or file is, without reading weights.

    Args:
        path: An experts folder, or a file: an expert's, another program's LoRA, or weights of any kind.

    Returns:
        A report that ``json.dumps`` takes and ``report_text`` prints.

    Raises:
        ExpertsError: If it is neither an experts folder nor a readable safetensors file.
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
        entry |= {
            "component": expert.component,
            "rank": expert.rank,
            "alpha": expert.alpha,
            "strength": expert.strength,
        }
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
    """Count tensors, parameters and bytes; the scalars that hold a LoRA's alpha are no parameters."""
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


def _short(metadata: Mapping[str, str]) -> dict[str, str]:
    """Cut long values, and make what a terminal would obey visible."""
    return {_plain(key): _plain(value if len(value) <= 200 else value[:197] + "...") for key, value in metadata.items()}


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def report_text(report: dict[str, Any]) -> str:
    """Write a report for people.

    Args:
        report: What ``inspect`` returns.

    Returns:
        A table of names and values.
    """
    if report["what"] in ("experts", "expert"):
        return _experts_text(report)
    rows = [("what", report["what"]), ("file", report["path"])]
    if report["what"] == "LoRA":
        alphas = ", ".join(f"{alpha:g}" for alpha in report["alphas"])
        if not alphas and report["alpha_in_metadata"]:
            inside = ", ".join(f"{alpha:g}" for alpha in report["alpha_in_metadata"])
            alphas = f"{inside} in the metadata only, which most programs pass over"
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
        if report["differences"]:
            rows.append(("differences", f"{report['differences']} of whole weights and biases"))
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
        lora += "" if entry["strength"] == 1 else f", strength {entry['strength']:g}"
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

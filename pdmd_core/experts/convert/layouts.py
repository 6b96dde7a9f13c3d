"""LoRA files, of this project and of others, in another layout."""

from __future__ import annotations

import json
from pathlib import Path

from ...families import FAMILIES, ModelFamily, family
from ..errors import ExpertsError
from ..folder import PhasedExperts
from ..format.manifest import MANIFEST_NAME
from ..format.weights import weights_of, write_weights
from ..lora.file import LoraFile, read_lora
from ..lora.layouts import Written, in_layout
from .output import check_output, new_folder
from .released import PEFT_CONFIG, PEFT_WEIGHTS, open_lora, open_source

_SUFFIXES = (".safetensors", ".sft")


def convert_layout(
    source: Path, output: Path, layout: str, family_name: str | None = None, overwrite: bool = False
) -> dict[str, list[str]]:
    """Write LoRA files in a layout of ``lora.layouts.LAYOUTS``.

    Args:
        source: A LoRA file, a folder of PEFT, or a folder of LoRA experts, whose strengths are then in the weights.
        output: For a file a file, for experts and in the layout of PEFT a folder; it appears complete or not at all.
        layout: The layout.
        family_name: The model family; None for the one that the keys or the manifest tell.
        overwrite: Whether an output that is there may be replaced.

    Returns:
        Name of each file that was written to the keys whose changes have no place in it.

    Raises:
        ExpertsError: If the source is no LoRA file of a known family, or if the output cannot be written.
    """
    if (source / MANIFEST_NAME).is_file():
        return _convert_experts(PhasedExperts.open(source), output, layout, family_name, overwrite)
    lora = open_source(source, own=True)
    kind = family(_known(family_name)) if family_name else lora.family
    if kind is None:
        raise ExpertsError(f"{source}: its keys do not tell its family: give --family {' or '.join(sorted(FAMILIES))}")
    weights = open_lora(lora.path)
    tensors = {name: weights.read(name) for name in weights.specs}
    written = _written(read_lora(tensors, lora.alphas, kind.lora_names, source.name), kind, layout)
    if layout == "peft":
        check_output(output, overwrite, [source])
        with new_folder(output) as folder:
            _write(folder / PEFT_WEIGHTS, written)
        return {output.name: written.left_out}
    if output.suffix not in _SUFFIXES:
        raise ExpertsError(f"--output {output}: a file that ends in .safetensors is expected here, for a LoRA file")
    if output.exists() and (not overwrite or output.resolve() == lora.path.resolve()):
        raise ExpertsError(f"--output {output} exists: choose another file, or replace another with --overwrite")
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.part")
    try:
        _write(part, written)
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
    return {output.name: written.left_out}


def _convert_experts(
    experts: PhasedExperts, output: Path, layout: str, family_name: str | None, overwrite: bool
) -> dict[str, list[str]]:
    base = experts.manifest.base.family
    if family_name not in (None, base):
        raise ExpertsError(f"{experts.folder}: its manifest says family {base}, --family says {family_name}")
    check_output(output, overwrite, [experts.folder])
    left_out = {}
    with new_folder(output) as folder:
        for expert in experts.manifest.experts:
            written = _written(experts.lora_changes(expert.name), family(_known(base)), layout)
            place = folder / expert.name / PEFT_WEIGHTS if layout == "peft" else folder / f"{expert.name}.safetensors"
            place.parent.mkdir(exist_ok=True)
            _write(place, written)
            left_out[expert.name] = written.left_out
    return left_out


def _known(name: str) -> str:
    if name not in FAMILIES:
        raise ExpertsError(f"the family is one of {', '.join(sorted(FAMILIES))}, found {name!r}")
    return name


def _written(file: LoraFile, kind: ModelFamily, layout: str) -> Written:
    written = in_layout(file, kind.lora_names, layout)
    if not written.tensors:
        raise ExpertsError(f"{file.what}: nothing of it has a place in the layout {layout} of {kind.title}")
    return written


def _write(path: Path, written: Written) -> None:
    write_weights(path, weights_of(written.tensors), {"format": "pt"})
    if written.config is not None:
        path.with_name(PEFT_CONFIG).write_text(json.dumps(written.config, indent=2) + "\n", encoding="utf-8")

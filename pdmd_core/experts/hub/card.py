"""The model card (README.md) of an experts folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...families import known_family
from ..errors import ExpertsError
from ..format.manifest import Manifest
from .card_code import comfyui_text, first_code, stock_code, training_size
from .ids import is_hub_id

PROMPT = "a panda on a blue background"

_GENERATED = (
    "<!-- Generated from phased_experts.json and written anew when pushed. Delete this line to keep your text. -->"
)
_TASKS = ("text-to-image", "text-to-video", "image-to-image", "image-to-video")

_TEMPLATE = """---
{metadata}
---

{generated}

# Phased experts of {base}

{count} expert(s) distilled {how} `{base}`: {steps} steps, {guidance_words}.
{base_note}{samples}
## Phases

Each expert runs the steps of its phase, high noise first.

```text
{table}
```

## diffusers

```sh
pip install "phased-dmd[diffusers]"
```

```python
{first}
```

Base, scheduler, steps and guidance come from the experts' manifest.
{stock}
## ComfyUI
{comfyui}{results}
## Files

| file | expert | kind | sha256 |
| --- | --- | --- | --- |
{files}

## Training

```json
{training}
```

## Licence

{licence}
"""


def write_card(folder: Path, manifest: Manifest, prompt: str = PROMPT) -> Path:
    """Write ``folder/README.md``, whose code loads the experts from that folder.

    Args:
        folder: The experts folder.
        manifest: The manifest of its experts.
        prompt: What the code samples.

    Returns:
        The path of the card.

    Raises:
        ExpertsError: If the folder has a report.json that is none.
    """
    path = folder / "README.md"
    path.write_text(card_text(manifest, folder.as_posix(), folder, prompt), encoding="utf-8")
    return path


def is_generated(card: str) -> bool:
    """Tell whether nobody claimed a card's text as their own.

    Args:
        card: The text.

    Returns:
        Whether it may be written anew.
    """
    return _GENERATED in card


def card_text(
    manifest: Manifest,
    location: str,
    folder: Path | None = None,
    prompt: str = PROMPT,
    licence: Mapping[str, str] | None = None,
) -> str:
    """Make the model card: metadata, pictures, phases, code for diffusers and ComfyUI, measurements, files, licence.

    Args:
        manifest: The manifest of the experts.
        location: Folder or Hub id from which the code of the card loads the experts.
        folder: Where report.json and samples/ (pictures and clips, a caption in ``<name>.txt`` beside each) are
            looked for.
        prompt: What the code samples.
        licence: ``license``, ``license_name`` and ``license_link`` of the base's card; those in ``manifest.training``
            go before them.

    Returns:
        The text of the card.

    Raises:
        ExpertsError: If the folder has a report.json that is none.
    """
    from huggingface_hub import ModelCardData

    base, experts = manifest.base.model, manifest.experts
    lora = all(expert.kind == "lora" for expert in experts)
    on_hub = is_hub_id(base) and not Path(base).exists()
    licence_fields, licence_text = _licence(manifest, licence or {}, folder, on_hub)
    metadata = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation=("adapter" if lora else "finetune") if on_hub else None,
        pipeline_tag=_task(manifest),
        library_name="diffusers",
        tags=["phased-dmd", "distillation", "few-step", *(["lora"] if lora else [])],
        license=licence_fields.get("license"),
        license_name=licence_fields.get("license_name"),
        license_link=licence_fields.get("license_link"),
    )
    note = f"\n`{base}` is a folder of the machine that trained them: give your own copy as `base=`.\n"
    guidance, takes_image = manifest.guidance_scale, (_task(manifest) or "").startswith("image-")
    return _TEMPLATE.format(
        metadata=metadata.to_yaml().strip(),
        generated=_GENERATED,
        base=base,
        base_note="" if on_hub else note,
        count=len(experts),
        how=_how(manifest),
        steps=len(manifest.plan.sigmas),
        guidance_words="without guidance" if guidance == 1 else f"guidance {guidance:g}",
        samples=_samples(folder) if folder else "",
        table=manifest.plan.describe(),
        first=first_code(manifest, location, prompt, takes_image),
        stock=stock_code(manifest, location, prompt, takes_image),
        comfyui=comfyui_text(manifest),
        results=_results(folder) if folder else "",
        files="\n".join(f"| {e.file} | {e.name} | {e.kind} | `{e.sha256}` |" for e in experts),
        training=json.dumps(dict(manifest.training), indent=2),
        licence=licence_text,
    )


def _how(manifest: Manifest) -> str:
    """What trained the experts, as far as the summary says."""
    if manifest.training.get("method") == "regression":
        return "by regression, phase by phase, on the path of"
    if manifest.training.get("method") == "denoising":
        return "by denoising the guided samples of"
    return "with Phased DMD (arXiv 2510.27684) from"


def _task(manifest: Manifest) -> str | None:
    """The Hub's name of what the experts do; None where neither the training nor the family says."""
    given, size = manifest.training.get("pipeline_tag"), training_size(manifest)
    family = known_family(manifest.base.architecture)
    if given in _TASKS:
        return str(given)
    if family is None:
        return None
    return "text-to-video" if family.makes_clips and not (size and size[2] == 1) else "text-to-image"


# --- what lies beside the experts ------------------------------------------------------------


def _samples(folder: Path) -> str:
    """Pictures and clips under relative links; of a picture and a clip of one name, the clip."""
    found = sorted(path for path in folder.glob("samples/*") if path.suffix in (".png", ".gif", ".mp4"))
    moving = {path.stem for path in found if path.suffix != ".png"}
    blocks = []
    for path in found:
        if path.suffix == ".png" and path.stem in moving:
            continue
        note = path.with_suffix(".txt")
        words = note.read_text(encoding="utf-8") if note.is_file() else re.sub(r"[-_]+", " ", path.stem)
        caption = re.sub(r"([\[\]\\<])", r"\\\1", " ".join(words.split()))
        link = f"[{caption}](samples/{quote(path.name)})"
        blocks.append(f"\n{link}\n" if path.suffix == ".mp4" else f"\n!{link}\n\n*{caption}*\n")
    return "".join(blocks)


_COLUMNS: dict[str, tuple[str, str]] = {
    "network_evaluations": ("network evaluations", "d"),
    "frechet": ("{features} to the teacher", ".4g"),
    "diversity": ("diversity", ".4g"),
    "agreement": ("prompt agreement", ".1%"),
    "seconds": ("seconds", ".1f"),
}


def _results(folder: Path) -> str:
    """The table of report.json, as training/evaluate.py writes it: the columns that its rows have."""
    path = folder / "report.json"
    if not path.is_file():
        return ""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        rows: list[dict[str, Any]] = report["rows"]
        columns = [key for key in _COLUMNS if all(key in row for row in rows)]
        cells = [[_cell(row["method"]), *(format(row[key], _COLUMNS[key][1]) for key in columns)] for row in rows]
        features = _cell(report.get("features", "Frechet distance"))
        samples = f"{report['prompts']} prompts, {report['seeds']} seeds each." if "seeds" in report else ""
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExpertsError(
            f"{path}: not a report of training/evaluate.py ({type(error).__name__}: {error}): write it anew or "
            "remove it"
        ) from None
    head = ["method", *(_COLUMNS[key][0].format(features=features) for key in columns)]
    rule = ["---", *["---:"] * len(columns)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *cells])
    low = f"{features}: a Frechet distance, lower is closer. " if "frechet" in columns else ""
    return f"\n## Measurements\n\n{table}\n\n{low}{samples}\n"


def _cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _licence(
    manifest: Manifest, of_base: Mapping[str, str], folder: Path | None, on_hub: bool
) -> tuple[dict[str, str], str]:
    """Metadata and a sentence. The Hub wants a name and a link with ``license: other``."""
    base = manifest.base.model
    recorded = {key: str(value) for key, value in manifest.training.items() if key.startswith("license") and value}
    fields = recorded if "license" in recorded else dict(of_base)
    given, name = fields.get("license", ""), fields.get("license_name", "")
    link = "LICENSE" if folder and (folder / "LICENSE").is_file() else fields.get("license_link", "")
    if given and given != "other" and not name:
        return {"license": given}, f"That of the base `{base}`: {given}."
    if not name or not (link or on_hub):
        return (
            {},
            f"The licence of the base `{base}` is not known here: read its terms first, they hold for the experts.",
        )
    link = link or f"https://huggingface.co/{base}"
    tag = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
    return {
        "license": "other",
        "license_name": tag,
        "license_link": link,
    }, f"That of the base `{base}`: [{name}]({link})."

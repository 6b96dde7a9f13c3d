"""The model card (README.md) of an experts folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..errors import ExpertsError
from ..format.manifest import Expert, Manifest
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

{count} expert(s) distilled with Phased DMD (arXiv 2510.27684) from `{base}`: {steps} steps, {guidance_words}.
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
from pdmd_core.pipelines import load_phased_pipeline

pipe = load_phased_pipeline({location})
picture = pipe({prompt}{arguments}).{output}[0]
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

_STOCK = """
### With stock diffusers classes

Only the scheduler is from `phased-dmd`; a stock scheduler walks other sigmas than the experts were trained on.

```python
{imports}from diffusers import DiffusionPipeline
from pdmd_core.scheduler import PhasedDMDScheduler

experts = {location}
scheduler = PhasedDMDScheduler.from_pretrained(experts, subfolder="scheduler")
pipe = DiffusionPipeline.from_pretrained({base}, {revision}scheduler=scheduler)
{switching}
result = pipe(
    {prompt}{arguments},
    num_inference_steps={steps},
    guidance_scale={guidance:g},{callback}
)
```
"""
_CALLBACK = "\n    callback_on_step_end=use_expert_of_next_step,"

_SWITCH_LORA = """names = {names}
{loading}


def use_expert_of_next_step(pipe, step, timestep, tensors):
    pipe.set_adapters(names[pipe.scheduler.phase])
    return tensors


pipe.set_adapters(names[0])"""

_SWITCH_FULL = """folder = experts if Path(experts).is_dir() else snapshot_download(experts)
networks = []
for file in {files}:
    networks.append(copy.deepcopy(pipe.transformer))
    networks[-1].load_state_dict(load_file(Path(folder) / file))


def use_expert_of_next_step(pipe, step, timestep, tensors):
    pipe.transformer = networks[pipe.scheduler.phase]
    return tensors


pipe.transformer = networks[0]"""

_IMPORTS_FULL = """import copy
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors.torch import load_file
"""

_COMFYUI_LORA = """
Put the `.safetensors` files into `ComfyUI/models/loras`. With the nodes of Phased DMD: `Load Phased Experts`, then any
sampler that takes a MODEL. With ComfyUI's own nodes: for each expert a `LoraLoaderModelOnly` on the base at strength 1
{sampling}
"""
_COMFYUI_FULL = """
With the nodes of Phased DMD: `Load Phased Experts`, then any sampler that takes a MODEL. With ComfyUI's own nodes: for
each expert a `Load Diffusion Model` (Wan's layout there is not diffusers' own: convert the files first)
{sampling}
"""
_CHAIN = """and a `KSampler (Advanced)`, one after the other on the same latent: sampler `euler`, scheduler `simple`,
steps {steps}, cfg {guidance:g}, shift {shift:.6g} (`ModelSamplingSD3`; Qwen-Image: `ModelSamplingAuraFlow`), and

| expert | add_noise | start_at_step | end_at_step | return_with_leftover_noise |
| --- | --- | ---: | ---: | --- |
{rows}"""
_NO_CHAIN = """and a sampler of exactly these sigmas, which scheduler `simple` gives at no shift. The nodes of
Phased DMD walk them."""


def write_card(folder: Path, manifest: Manifest, prompt: str = PROMPT) -> Path:
    """Write ``folder/README.md``; its code loads the experts from that folder."""
    path = folder / "README.md"
    path.write_text(card_text(manifest, folder.as_posix(), folder, prompt), encoding="utf-8")
    return path


def is_generated(card: str) -> bool:
    """Whether nobody claimed this card's text as their own."""
    return _GENERATED in card


def card_text(
    manifest: Manifest,
    location: str,
    folder: Path | None = None,
    prompt: str = PROMPT,
    licence: Mapping[str, str] | None = None,
) -> str:
    """The model card: metadata, pictures, phases, code for diffusers and ComfyUI, measurements, files, licence.

    location: folder or Hub id from which the code of the card loads the experts.
    folder: where report.json and samples/ (pictures and clips, a caption in ``<name>.txt`` beside each) are looked for.
    licence: ``license``, ``license_name``, ``license_link`` of the base's card; ``manifest.training`` goes before it.
    Raises ExpertsError for a report.json that is none.
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
    guidance = manifest.guidance_scale
    return _TEMPLATE.format(
        metadata=metadata.to_yaml().strip(),
        generated=_GENERATED,
        base=base,
        base_note="" if on_hub else note,
        count=len(experts),
        steps=len(manifest.plan.sigmas),
        guidance_words="without guidance" if guidance == 1 else f"guidance {guidance:g}",
        samples=_samples(folder) if folder else "",
        table=manifest.plan.describe(),
        location=_quoted(location),
        prompt=_quoted(prompt),
        arguments=_arguments(manifest),
        output="frames" if _makes_clips(manifest) else "images",
        stock=_stock(manifest, location, prompt),
        comfyui=_comfyui(manifest, lora),
        results=_results(folder) if folder else "",
        files="\n".join(f"| {e.file} | {e.name} | {e.kind} | `{e.sha256}` |" for e in experts),
        training=json.dumps(dict(manifest.training), indent=2),
        licence=licence_text,
    )


def _makes_clips(manifest: Manifest) -> bool:
    """diffusers names networks of video pipelines ...Transformer3DModel; their output has ``frames``."""
    return "3D" in manifest.base.architecture


def _size(manifest: Manifest) -> tuple[int, int, int] | None:
    size: Any = manifest.training.get("size")
    known = isinstance(size, list) and len(size) == 3 and all(isinstance(n, int) for n in size)
    return (size[0], size[1], size[2]) if known else None


def _task(manifest: Manifest) -> str:
    given, size = manifest.training.get("pipeline_tag"), _size(manifest)
    if given in _TASKS:
        return str(given)
    return "text-to-video" if _makes_clips(manifest) and not (size and size[2] == 1) else "text-to-image"


def _arguments(manifest: Manifest) -> str:
    size, length = _size(manifest), manifest.training.get("max_sequence_length")
    text = f", width={size[0]}, height={size[1]}" if size else ""
    text += f", num_frames={size[2]}" if size and _makes_clips(manifest) else ""
    return text + (f", max_sequence_length={length}" if isinstance(length, int) else "")


# --- code ------------------------------------------------------------


def _stock(manifest: Manifest, location: str, prompt: str) -> str:
    """Experts of one component are switched by a callback; Wan's pipeline itself switches between its two."""
    experts = manifest.experts
    lora, components = all(e.kind == "lora" for e in experts), [e.component for e in experts]
    imports, callback = "", _CALLBACK
    if lora and components == ["transformer", "transformer_2"]:
        # strictly between the last sigma of one phase and the first of the next: the pipeline's own rule is ">="
        boundary = (manifest.plan.phases[0].sigmas[-1] + manifest.plan.phases[1].sigmas[0]) / 2
        switching = f"{_loading(experts)}\npipe.register_to_config(boundary_ratio={boundary:.6g})"
        callback = ""
    elif set(components) != {"transformer"} or len({e.kind for e in experts}) > 1:
        return ""
    elif lora:
        switching = _SWITCH_LORA.format(names=json.dumps([e.name for e in experts]), loading=_loading(experts))
    else:
        switching = _SWITCH_FULL.format(files=json.dumps([e.file for e in experts]))
        imports = _IMPORTS_FULL
    return _STOCK.format(
        imports=imports,
        location=_quoted(location),
        base=_quoted(manifest.base.model),
        revision=f"revision={_quoted(manifest.base.revision)}, " if manifest.base.revision else "",
        switching=switching,
        prompt=_quoted(prompt),
        arguments=_arguments(manifest),
        steps=len(manifest.plan.sigmas),
        guidance=manifest.guidance_scale,
        callback=callback,
    )


def _loading(experts: tuple[Expert, ...]) -> str:
    lines = []
    for expert in experts:
        into = f", load_into_{expert.component}=True" if expert.component != "transformer" else ""
        lines.append(
            f'pipe.load_lora_weights(experts, weight_name="{expert.file}", adapter_name="{expert.name}"{into})'
        )
    return "\n".join(lines)


def _comfyui(manifest: Manifest, lora: bool) -> str:
    template, plan = _COMFYUI_LORA if lora else _COMFYUI_FULL, manifest.plan
    if plan.shift is None:
        return template.format(sampling=_NO_CHAIN)
    rows, start = [], 0
    for k, phase in enumerate(plan.phases):
        first, last, end = k == 0, k == len(plan) - 1, start + len(phase.sigmas)
        on = ["enable" if first else "disable", "disable" if last else "enable"]
        rows.append(f"| {phase.name} | {on[0]} | {start} | {end} | {on[1]} |")
        start = end
    chain = _CHAIN.format(steps=start, guidance=manifest.guidance_scale, shift=plan.shift, rows="\n".join(rows))
    return template.format(sampling=chain)


def _quoted(text: str) -> str:
    """A string literal of Python."""
    return json.dumps(text, ensure_ascii=False)


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

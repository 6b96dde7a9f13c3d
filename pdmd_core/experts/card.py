"""The model card (README.md) of an experts folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .manifest import Manifest

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_TEMPLATE = """---
{metadata}
---

# Phased experts of {base}

{count} expert(s) distilled with Phased DMD (arXiv 2510.27684) from `{base}`: {steps} steps, guidance {guidance:g}.

```text
{table}
```

## diffusers

```python
{imports}from diffusers import DiffusionPipeline
from pdmd_core.scheduler import PhasedDMDScheduler

experts = {location}
scheduler = PhasedDMDScheduler.from_pretrained(experts, subfolder="scheduler")
pipe = DiffusionPipeline.from_pretrained({base_text}, scheduler=scheduler)
{switching}
result = pipe(
    {prompt}, num_inference_steps={steps}, guidance_scale={guidance:g},{size}
    callback_on_step_end=use_expert_of_next_step,
)
```

Pass the scheduler as above: a stock scheduler walks other sigmas than the experts were trained on.

## Files

| file | expert | kind | sha256 |
| --- | --- | --- | --- |
{files}

## Training

```json
{training}
```
"""


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


PROMPT = "a panda on a blue background"


def write_card(folder: Path, manifest: Manifest, prompt: str = PROMPT) -> Path:
    """Write ``folder/README.md``; its code loads the experts from that folder."""
    path = folder / "README.md"
    path.write_text(card_text(manifest, folder.as_posix(), prompt), encoding="utf-8")
    return path


def card_text(manifest: Manifest, location: str, prompt: str = PROMPT) -> str:
    """The model card: metadata, the phase table, code for diffusers, files and training summary.

    location: folder or Hub id from which the code of the card loads the experts.
    """
    from huggingface_hub import ModelCardData

    base = manifest.base.model
    lora = all(expert.kind == "lora" for expert in manifest.experts)
    metadata = ModelCardData(
        base_model=base if _HUB_ID.fullmatch(base) and not Path(base).exists() else None,
        library_name="diffusers",
        tags=["phased-dmd", "distillation", "few-step", *(["lora"] if lora else [])],
    )
    size = manifest.training.get("size")
    arguments = f" width={size[0]}, height={size[1]}, num_frames={size[2]}," if size else ""
    length = manifest.training.get("max_sequence_length")
    arguments += f" max_sequence_length={length}," if length else ""
    if lora:
        loading = "\n".join(
            f'pipe.load_lora_weights(experts, weight_name="{expert.file}", adapter_name="{expert.name}")'
            for expert in manifest.experts
        )
        switching = _SWITCH_LORA.format(names=[expert.name for expert in manifest.experts], loading=loading)
    else:
        switching = _SWITCH_FULL.format(files=[expert.file for expert in manifest.experts])
    return _TEMPLATE.format(
        metadata=metadata.to_yaml().strip(),
        base=base,
        base_text=_quoted(base),
        imports="" if lora else _IMPORTS_FULL,
        location=_quoted(location),
        count=len(manifest.experts),
        steps=len(manifest.plan.sigmas),
        guidance=manifest.guidance_scale,
        table=manifest.plan.describe(),
        switching=switching,
        prompt=_quoted(prompt),
        size=arguments,
        files="\n".join(f"| {e.file} | {e.name} | {e.kind} | `{e.sha256}` |" for e in manifest.experts),
        training=json.dumps(dict(manifest.training), indent=2),
    )


def _quoted(text: str) -> str:
    """A string literal of Python."""
    return json.dumps(text, ensure_ascii=False)

"""The model card (README.md) of an experts folder."""

from __future__ import annotations

import json
from pathlib import Path

from .manifest import Manifest

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
from diffusers import DiffusionPipeline
from pdmd_core.scheduler import PhasedDMDScheduler

experts = {folder}
scheduler = PhasedDMDScheduler.from_pretrained(experts, subfolder="scheduler")
pipe = DiffusionPipeline.from_pretrained({base_text}, scheduler=scheduler)
names = {names}
{loading}

def use_expert_of_next_step(pipe, step, timestep, tensors):
    pipe.set_adapters(names[pipe.scheduler.phase])
    return tensors

pipe.set_adapters(names[0])
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


def write_card(folder: Path, manifest: Manifest, prompt: str = "a panda on a blue background") -> Path:
    """Write ``folder/README.md``: metadata, the phase table, code for diffusers, files and training summary."""
    from huggingface_hub import ModelCardData

    base = manifest.base.model
    metadata = ModelCardData(
        base_model=base if not Path(base).is_dir() else None,
        library_name="diffusers",
        tags=["phased-dmd", "distillation", "few-step", *(["lora"] if manifest.experts[0].kind == "lora" else [])],
    )
    size = manifest.training.get("size")
    arguments = f" width={size[0]}, height={size[1]}, num_frames={size[2]}," if size else ""
    length = manifest.training.get("max_sequence_length")
    arguments += f" max_sequence_length={length}," if length else ""
    loading = "\n".join(
        f'pipe.load_lora_weights(experts, weight_name="{expert.file}", adapter_name="{expert.name}")'
        for expert in manifest.experts
        if expert.kind == "lora"
    )
    text = _TEMPLATE.format(
        metadata=metadata.to_yaml().strip(),
        base=base,
        base_text=_quoted(base),
        folder=_quoted(folder.as_posix()),
        count=len(manifest.experts),
        steps=len(manifest.plan.sigmas),
        guidance=manifest.guidance_scale,
        table=manifest.plan.describe(),
        names=[expert.name for expert in manifest.experts],
        loading=loading,
        prompt=_quoted(prompt),
        size=arguments,
        files="\n".join(f"| {e.file} | {e.name} | {e.kind} | `{e.sha256}` |" for e in manifest.experts),
        training=json.dumps(dict(manifest.training), indent=2),
    )
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def _quoted(text: str) -> str:
    """A string literal of Python."""
    return json.dumps(text, ensure_ascii=False)

"""What a model card says of how its experts are run: code for diffusers, and the settings of ComfyUI's nodes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ...families import ModelFamily, known_family
from ...families.guidance import pipeline_named
from ..format.manifest import Expert, Manifest

_FIRST = """from pdmd_core.pipelines import load_phased_pipeline
{imports}
pipe = load_phased_pipeline({location})
picture = pipe(prompt={prompt}{arguments}){output}"""

_STOCK = """
### With stock diffusers classes

Only the scheduler is from `phased-dmd`; a stock scheduler walks other sigmas than the experts were trained on.

```python
{imports}from diffusers import {pipeline}
{more_imports}from pdmd_core.scheduler import PhasedDMDScheduler

experts = {location}
scheduler = PhasedDMDScheduler.from_pretrained(experts, subfolder="scheduler")
pipe = {pipeline}.from_pretrained({base}, {revision}scheduler=scheduler)
{switching}
result = pipe(
    prompt={prompt}{arguments},
    num_inference_steps={steps},{guidance}{callback}
)
```
"""
_CALLBACK = "\n    callback_on_step_end=use_expert_of_next_step,"

_SWITCH_LORA = """names = {names}
{loading}


def use_expert_of_next_step(pipe, step, timestep, tensors):
    pipe.set_adapters(names[pipe.scheduler.phase]{now})
    return tensors


pipe.set_adapters(names[0]{first})"""

_SWITCH_LORA_IN_NETWORK = """names = {names}
{loading}


def use_expert_of_step(network, *call):
    network.set_adapters(names[pipe.scheduler.phase]{now})


pipe.transformer.register_forward_pre_hook(use_expert_of_step)"""

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
_IMPORT_IMAGE = "from diffusers.utils import load_image\n"

_COMFYUI_LORA = """
Put the `.safetensors` files into `ComfyUI/models/loras`. With the nodes of Phased DMD: `Load Phased Experts`, then any
sampler that takes a MODEL. With ComfyUI's own nodes: for each expert a `LoraLoaderModelOnly` on the base {at}
{sampling}
"""
_COMFYUI_FULL = """
With the nodes of Phased DMD: `Load Phased Experts`, then any sampler that takes a MODEL. With ComfyUI's own nodes: for
each expert a `Load Diffusion Model` (where its layout is not diffusers' own, convert the files first)
{sampling}
"""
_CHAIN = """and a `KSampler (Advanced)`, one after the other on the same latent: sampler `euler`, scheduler `simple`,
steps {steps}, cfg {guidance:g}, shift {shift:.6g}{node}, and

| expert | add_noise | start_at_step | end_at_step | return_with_leftover_noise |
| --- | --- | ---: | ---: | --- |
{rows}"""
_NO_CHAIN = """and a sampler of exactly these sigmas, which scheduler `simple` gives at no shift. The nodes of
Phased DMD walk them."""


def first_code(manifest: Manifest, location: str, prompt: str, takes_image: bool) -> str:
    """Make the shortest code that samples with the experts.

    Args:
        manifest: The manifest of the experts.
        location: Folder or Hub id of the experts.
        prompt: What is sampled.
        takes_image: Whether the base's pipeline is given a picture.

    Returns:
        The code.
    """
    family = known_family(manifest.base.architecture)
    output = "[0][0]" if family is None else ".frames[0]" if family.makes_clips else ".images[0]"
    return _FIRST.format(
        imports=_IMPORT_IMAGE if takes_image else "",
        location=quoted(location),
        prompt=quoted(prompt),
        arguments=_arguments(manifest, family, takes_image),
        output=output,
    )


def stock_code(manifest: Manifest, location: str, prompt: str, takes_image: bool) -> str:
    """Make the section with code for stock diffusers classes.

    Experts of one network are switched by a callback; a pipeline of two networks with an expert each switches itself.

    Args:
        manifest: The manifest of the experts.
        location: Folder or Hub id of the experts.
        prompt: What is sampled.
        takes_image: Whether the base's pipeline is given a picture.

    Returns:
        The section; empty where stock classes cannot run these experts.
    """
    family, experts = known_family(manifest.base.architecture), manifest.experts
    components, kinds = [expert.component for expert in experts], {expert.kind for expert in experts}
    if family is None or len(kinds) > 1:
        return ""
    calls_back = "callback_on_step_end" not in family.call_lacks
    if not calls_back and kinds == {"full"}:
        return ""
    try:
        routing = family.stock_routing(manifest.plan, components)
        loading = "\n".join(_loading(expert, family) for expert in experts)
    except ValueError:
        return ""
    imports, callback = "", _CALLBACK
    if len(set(components)) == 1:
        if kinds == {"lora"}:
            switching = _SWITCH_LORA if calls_back else _SWITCH_LORA_IN_NETWORK
            switching = switching.format(loading=loading, **_names_and_strengths(experts))
            callback = callback if calls_back else ""
        else:
            switching, imports = _SWITCH_FULL.format(files=json.dumps([e.file for e in experts])), _IMPORTS_FULL
    elif kinds == {"lora"} and len(set(components)) == len(components):
        at = [e for e in experts if e.strength != 1]
        weights = (f'pipe.{e.component}.set_adapters("{e.name}", {e.strength:g})' for e in at)
        switching, callback = "\n".join([loading, *weights]), ""
    else:
        return ""
    if routing:
        entries = ", ".join(f"{name}={_literal(value)}" for name, value in routing.items())
        switching += f"\npipe.register_to_config({entries})"
    if family.guider:
        imports += "from diffusers import ClassifierFreeGuidance\n"
        switching += f"\npipe.{family.guider} = ClassifierFreeGuidance(guidance_scale={manifest.guidance_scale:g})"
    noted = pipeline_named(manifest.training.get("pipeline"))
    guidance = family.guidance_arguments(manifest.guidance_scale, noted)
    needed = noted is not None and takes_image and family.needs_image(noted)  # the base may name one without pictures
    return _STOCK.format(
        pipeline=noted.__name__ if noted is not None and needed else "DiffusionPipeline",
        imports=imports,
        more_imports=_IMPORT_IMAGE if takes_image else "",
        location=quoted(location),
        base=quoted(manifest.base.model),
        revision=f"revision={quoted(manifest.base.revision)}, " if manifest.base.revision else "",
        switching=switching,
        prompt=quoted(prompt),
        arguments=_arguments(manifest, family, takes_image),
        steps=len(manifest.plan.sigmas),
        guidance="".join(f"\n    {name}={value:g}," for name, value in guidance.items()),
        callback=callback,
    )


def comfyui_text(manifest: Manifest) -> str:
    """Say how ComfyUI runs the experts, with this project's nodes and with its own.

    Args:
        manifest: The manifest of the experts.

    Returns:
        The text.
    """
    lora, plan = all(expert.kind == "lora" for expert in manifest.experts), manifest.plan
    template = _COMFYUI_LORA if lora else _COMFYUI_FULL
    strengths = [f"{expert.strength:g}" for expert in manifest.experts]
    each = [f"{expert.strength:g} ({expert.name})" for expert in manifest.experts]
    at = f"at strength {strengths[0] if len({*strengths}) == 1 else ', '.join(each)}"
    if plan.shift is None:
        return template.format(sampling=_NO_CHAIN, at=at)
    rows, start = [], 0
    for k, phase in enumerate(plan.phases):
        first, last, end = k == 0, k == len(plan) - 1, start + len(phase.sigmas)
        on = ["enable" if first else "disable", "disable" if last else "enable"]
        rows.append(f"| {phase.name} | {on[0]} | {start} | {end} | {on[1]} |")
        start = end
    family = known_family(manifest.base.architecture)
    chain = _CHAIN.format(
        steps=start,
        guidance=manifest.guidance_scale,
        shift=plan.shift,
        node=f" (`{family.comfyui_sampling}`)" if family else "",
        rows="\n".join(rows),
    )
    return template.format(sampling=chain, at=at)


def training_size(manifest: Manifest) -> tuple[int, int, int] | None:
    """Read the size of the samples of the distillation.

    Args:
        manifest: The manifest of the experts.

    Returns:
        Width, height and frames, or None where the manifest does not say.
    """
    size: Any = manifest.training.get("size")
    known = isinstance(size, list) and len(size) == 3 and all(isinstance(n, int) for n in size)
    return (size[0], size[1], size[2]) if known else None


def quoted(text: str) -> str:
    """Write a text as Python does.

    Args:
        text: Any text.

    Returns:
        A string literal.
    """
    return json.dumps(text, ensure_ascii=False)


def _arguments(manifest: Manifest, family: ModelFamily | None, takes_image: bool) -> str:
    size, length = training_size(manifest), manifest.training.get("max_sequence_length")
    length = None if family and "max_sequence_length" in family.call_lacks else length
    text = ', image=load_image("image.png")' if takes_image else ""
    text += ', last_image=load_image("last.png")' if takes_image and manifest.training.get("last_image") else ""
    sized = not (takes_image and family and family.picture_sets_size)
    text += f", width={size[0]}, height={size[1]}" if size and sized else ""
    text += f", num_frames={size[2]}" if size and family and family.makes_clips else ""
    return text + (f", max_sequence_length={length}" if isinstance(length, int) else "")


def _names_and_strengths(experts: Sequence[Expert]) -> dict[str, str]:
    """The list of names in the code, and the strengths where one is not 1."""
    names, strengths = json.dumps([e.name for e in experts]), [e.strength for e in experts]
    if set(strengths) == {1.0}:
        return {"names": names, "now": "", "first": ""}
    listed = ", ".join(f"{strength:g}" for strength in strengths)
    now, first = ", strengths[pipe.scheduler.phase]", ", strengths[0]"
    return {"names": f"{names}\nstrengths = [{listed}]", "now": now, "first": first}


def _loading(expert: Expert, family: ModelFamily) -> str:
    into = "".join(f", {name}={value}" for name, value in family.lora_arguments(expert.component).items())
    return f'pipe.{family.lora_loader}(experts, weight_name="{expert.file}", adapter_name="{expert.name}"{into})'


def _literal(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else repr(value)

"""Presets against ComfyUI's own workflow templates, as its package ships them: files, steps, shift, split, guidance."""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdmd_core.phases import PhasePlan
from pdmd_core.presets import PRESETS, Preset

COMPARED = [name for name, preset in PRESETS.items() if preset.template]


def templates() -> Path:
    spec = importlib.util.find_spec("comfyui_workflow_templates_json")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations))) / "templates"


def nodes(template: str) -> Iterator[dict[str, Any]]:
    """All nodes of a template, those inside of subgraphs too."""
    data = json.loads((templates() / f"{template}.json").read_text(encoding="utf-8"))
    yield from data["nodes"]
    for graph in data.get("definitions", {}).get("subgraphs", []):
        yield from graph["nodes"]


def said(template: str) -> dict[str, set[Any]]:
    """What a template says, by what it is: a workflow with and without a LoRA says two of some."""
    found: dict[str, set[Any]] = defaultdict(set)
    for node in nodes(template):
        values, title = node.get("widgets_values") or [], (node.get("title") or "").lower()
        match node["type"]:
            case "KSampler":
                found["steps"].add(values[2])
                found["cfg"].add(values[3])
            case "KSamplerAdvanced":
                found["steps"].add(values[3])
                found["cfg"].add(values[4])
                found["split"].add(values[8])
            case "ModelSamplingSD3" | "ModelSamplingAuraFlow":
                found["shift"].add(round(values[0], 6))
            case "Flux2Scheduler":
                found["flux2"].add(tuple(values))
            case "ManualSigmas":
                found["sigmas"].add(tuple(float(sigma) for sigma in values[0].split(",")))
            case "CFGGuider":
                found["cfg"].add(values[0])
            case "PrimitiveInt" if "step" in title or "stpes" in title:
                found["split" if "split" in title else "steps"].add(values[0])
            case "PrimitiveFloat" if "cfg" in title:
                found["cfg"].add(values[0])
    return found


@pytest.mark.parametrize("name", COMPARED)
def test_a_preset_is_what_comfyui_s_template_says(name: str) -> None:
    preset: Preset = PRESETS[name]
    assert preset.template is not None
    found, plan = said(preset.template), PhasePlan.preset(name)
    text = (templates() / f"{preset.template}.json").read_text(encoding="utf-8")
    for file in preset.files:
        owner, repository, path = file.split("/", 2)
        assert f"huggingface.co/{owner}/{repository}/resolve/main/{path}" in text, file
    assert preset.guidance in found["cfg"]
    if preset.sigmas:
        assert (*plan.sigmas, 0.0) in found["sigmas"]
    elif found["flux2"]:
        assert (len(plan.sigmas), 1024, 1024) in found["flux2"]
    else:
        assert len(plan.sigmas) in found["steps"]
        assert (preset.template_shift or preset.shift) in found["shift"]
    if len(plan) == 2:
        assert len(plan.phases[0].sigmas) in found["split"]


def test_most_presets_are_compared() -> None:
    assert len(COMPARED) >= 10


def test_flux_2_s_own_sigmas(pack) -> None:
    """Of ComfyUI's scheduler node at the size of the preset."""
    (sigmas,) = pack.call("Flux2Scheduler", steps=4, width=1024, height=1024)
    assert sigmas.tolist()[:-1] == pytest.approx(list(PhasePlan.preset("flux2-klein-4b").sigmas), abs=1e-6)

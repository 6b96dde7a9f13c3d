"""Pieces that the example workflows share."""

from __future__ import annotations

from typing import Any

from tests.helpers.comfyui.graphs import Graph, Output

HUB = "https://huggingface.co"
PROMPT = "A red fox runs through a snowy forest at sunrise, the camera follows it, soft golden light."
NOTE = (-430, 0)
"""Left of everything: what is read first."""


def hub_file(source: str, directory: str, name: str) -> dict[str, Any]:
    return {"models": [hub_model(f"{source}/{directory}", directory, name)]}


def hub_model(source: str, directory: str, name: str) -> dict[str, str]:
    return {"name": name, "url": f"{source}/{name}", "directory": directory}


def network(graph: Graph, name: str, at: tuple[int, int], source: str, lora: str | None = None) -> Output:
    words = {"unet_name": name, "weight_dtype": "default", **hub_file(source, "diffusion_models", name)}
    (model,) = graph.add("UNETLoader", at, (330, 90), **words)
    if lora is None:
        return model
    (model,) = graph.add(
        "LoraLoaderModelOnly",
        (at[0] + 380, at[1]),
        (330, 90),
        model=model,
        lora_name=lora,
        strength_model=1.0,
        **hub_file(source, "loras", lora),
    )
    return model


def text_encoder(graph: Graph, name: str, kind: str, source: str, at: tuple[int, int]) -> Output:
    words = {"clip_name": name, "type": kind, "device": "default", **hub_file(source, "text_encoders", name)}
    return graph.add("CLIPLoader", at, (330, 120), **words)[0]


def prompts(graph: Graph, clip: Output, at: tuple[int, int], text: str = PROMPT) -> tuple[Output, Output]:
    (positive,) = graph.add("CLIPTextEncode", at, (360, 140), "Prompt", clip=clip, text=text)
    below = (at[0], at[1] + 190)
    (negative,) = graph.add("CLIPTextEncode", below, (360, 90), "Negative prompt", clip=clip, text="blurry, static")
    return positive, negative


def autoencoder(graph: Graph, name: str, source: str, at: tuple[int, int]) -> Output:
    return graph.add("VAELoader", at, (330, 70), vae_name=name, **hub_file(source, "vae", name))[0]


def plan_of_steps(graph: Graph, at: tuple[int, int], steps: str, shift: float, names: str = "") -> Output:
    return graph.add("PhasedDMDPlanFromSteps", at, (360, 220), steps=steps, shift=shift, names=names)[0]


def plan_of_preset(graph: Graph, at: tuple[int, int], preset: str) -> Output:
    return graph.add("PhasedDMDPlanFromPreset", at, (360, 250), preset=preset)[0]


def experts_of(graph: Graph, at: tuple[int, int], plan: Output, cfg: str, *models: Output) -> Output:
    inputs = {"plan": plan, "cfg": cfg, "set_shift": True, **{f"model_{k}": each for k, each in enumerate(models, 1)}}
    return graph.add("PhasedDMDExperts", at, (340, 310), **inputs)[0]


def phased_sampler(graph: Graph, at: tuple[int, int], model: Output, **inputs: Any) -> Output:
    usual = {"seed": 1, "steps": 0, "cfg": 1.0, "sampler_name": "euler"}
    return graph.add("PhasedDMDSampler", at, (340, 560), model=model, **{**usual, **inputs})[0]


def plan_report(graph: Graph, at: tuple[int, int], model: Output) -> None:
    graph.add("PhasedDMDPlanReport", at, (460, 380), model=model)

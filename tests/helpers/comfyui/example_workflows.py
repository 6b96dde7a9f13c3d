"""The example workflows, in words of their nodes; ``write_assets`` makes ``workflows/`` of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.helpers.comfyui.graphs import Graph, Output

_HUB = "https://huggingface.co"
_WAN22 = f"{_HUB}/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
_WAN21 = f"{_HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
_QWEN = f"{_HUB}/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files"
_PROMPT = "A red fox runs through a snowy forest at sunrise, the camera follows it, soft golden light."


def _file(source: str, directory: str, name: str) -> dict[str, Any]:
    return {"models": [{"name": name, "url": f"{source}/{directory}/{name}", "directory": directory}]}


def _network(graph: Graph, name: str, at: tuple[int, int], source: str, lora: str | None = None) -> Output:
    (model,) = graph.add(
        "UNETLoader", at, (330, 90), unet_name=name, weight_dtype="default", **_file(source, "diffusion_models", name)
    )
    if lora is None:
        return model
    place = (at[0], at[1] + 140)
    (model,) = graph.add(
        "LoraLoaderModelOnly",
        place,
        (330, 90),
        model=model,
        lora_name=lora,
        strength_model=1.0,
        **_file(source, "loras", lora),
    )
    return model


def _text(graph: Graph, encoder: str, kind: str, source: str, at: tuple[int, int]) -> tuple[Output, Output]:
    (clip,) = graph.add(
        "CLIPLoader", at, clip_name=encoder, type=kind, device="default", **_file(source, "text_encoders", encoder)
    )
    (positive,) = graph.add("CLIPTextEncode", (at[0] + 380, at[1]), (360, 140), "Prompt", clip=clip, text=_PROMPT)
    (negative,) = graph.add(
        "CLIPTextEncode", (at[0] + 380, at[1] + 190), (360, 90), "Negative prompt", clip=clip, text="blurry, static"
    )
    return positive, negative


def _vae(graph: Graph, name: str, source: str, at: tuple[int, int]) -> Output:
    return graph.add("VAELoader", at, (330, 70), vae_name=name, **_file(source, "vae", name))[0]


def _plan(graph: Graph, at: tuple[int, int], steps: str, shift: float, names: str = "") -> Output:
    return graph.add("PhasedDMDPlanFromSteps", at, (360, 190), steps=steps, shift=shift, names=names)[0]


def _sampler(graph: Graph, at: tuple[int, int], model: Output, **inputs: Any) -> Output:
    (latent,) = graph.add(
        "PhasedDMDSampler", at, (340, 560), model=model, seed=1, steps=0, cfg=1.0, sampler_name="euler", **inputs
    )
    return latent


def _video(graph: Graph, at: tuple[int, int], latent: Output, vae: Output, prefix: str) -> None:
    (images,) = graph.add("VAEDecode", at, (240, 60), samples=latent, vae=vae)
    (video,) = graph.add("CreateVideo", (at[0], at[1] + 110), (240, 80), images=images, fps=16.0)
    graph.add("SaveVideo", (at[0], at[1] + 270), (340, 340), video=video, filename_prefix=prefix)


def _report(graph: Graph, at: tuple[int, int], model: Output) -> None:
    graph.add("PhasedDMDPlanReport", at, (360, 300), model=model)


def _wan22(graph: Graph, task: str, version: str, plain_first: bool = False) -> Output:
    """Wan2.2's two networks with their 4-step LoRAs as one MODEL."""
    parts = [f"wan2.2_{task}_{part}_noise_14B_fp8_scaled.safetensors" for part in ("high", "low")]
    loras = [f"wan2.2_{task}_lightx2v_4steps_lora_{version}_{part}_noise.safetensors" for part in ("high", "low")]
    high = _network(graph, parts[0], (0, 0), _WAN22, loras[0])
    low = _network(graph, parts[1], (0, 300), _WAN22, loras[1])
    if not plain_first:
        plan = _plan(graph, (380, 0), "2, 2", 5.0)
        (model,) = graph.add(
            "PhasedDMDExperts", (800, 0), (340, 280), plan=plan, cfg="1", set_shift=True, model_1=high, model_2=low
        )
        return model
    plan = _plan(graph, (380, 0), "1, 1, 2", 5.0, "undistilled, high_noise, low_noise")
    base = Output(high.node - 1, 0, "MODEL")
    (model,) = graph.add(
        "PhasedDMDExperts",
        (800, 0),
        (340, 280),
        plan=plan,
        cfg="3.5, 1, 1",
        set_shift=True,
        model_1=base,
        model_2=high,
        model_3=low,
    )
    return model


def wan22_t2v(graph: Graph, plain_first: bool = False) -> None:
    model = _wan22(graph, "t2v", "v1.1", plain_first)
    positive, negative = _text(graph, "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan", _WAN21, (0, 620))
    vae = _vae(graph, "wan_2.1_vae.safetensors", _WAN22, (0, 800))
    (empty,) = graph.add("EmptyHunyuanLatentVideo", (800, 760), (340, 160), width=640, height=640, length=81)
    sampled = _sampler(graph, (1190, 0), model, positive=positive, negative=negative, latent_image=empty)
    _video(graph, (1580, 0), sampled, vae, "phased/wan22")
    _report(graph, (1190, 620), model)
    first = (
        "The first step runs **without** the few-step LoRA and **with** guidance (cfg 3.5): it decides the "
        "motion, which "
        "distilled models have less of. The sigmas are those of the usual four steps; `1, 1, 2` only gives the "
        "first one "
        "to a phase of its own.\n\nEverything after it is the distilled 4-step model at cfg 1."
    )
    usual = (
        "Wan2.2's two networks as **one MODEL**: one sampler, one progress bar, no steps to split. The hand-over is at "
        "sigma 0.8333, exactly where the 4-step LoRAs were trained to hand over.\n\n- More motion: see the "
        "workflow with "
        "an undistilled first step.\n- LoRAs of your own go between Phased Experts and the sampler: they are put onto "
        "both networks.\n- Any sampler takes this MODEL. With KSampler: scheduler `simple`, 4 steps."
    )
    graph.note(f"## Wan2.2 text to video, 4 steps\n\n{first if plain_first else usual}", (380, 240), (360, 340))


def wan22_undistilled_first_step(graph: Graph) -> None:
    wan22_t2v(graph, plain_first=True)


def wan22_i2v(graph: Graph) -> None:
    model = _wan22(graph, "i2v", "v1")
    positive, negative = _text(graph, "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan", _WAN21, (0, 620))
    vae = _vae(graph, "wan_2.1_vae.safetensors", _WAN22, (0, 800))
    image, _ = graph.add("LoadImage", (0, 920), (330, 320))
    size = {"width": 640, "height": 640, "length": 81, "batch_size": 1}
    inputs = {"positive": positive, "negative": negative, "vae": vae, "start_image": image}
    ready = graph.add("WanImageToVideo", (800, 660), (340, 230), **inputs, **size)
    sampled = _sampler(graph, (1190, 0), model, positive=ready[0], negative=ready[1], latent_image=ready[2])
    _video(graph, (1580, 0), sampled, vae, "phased/wan22_i2v")
    _report(graph, (1190, 620), model)
    graph.note(
        "## Wan2.2 image to video, 4 steps\n\nChoose a start image at the lower left. Both networks are one MODEL; the "
        "hand-over is at sigma 0.8333, exactly where the 4-step LoRAs were trained to hand over.",
        (380, 240),
        (360, 260),
    )


def _qwen_image(graph: Graph, model: Output, prefix: str, note: str) -> None:
    """From the MODEL with its experts to a saved picture."""
    positive, negative = _text(graph, "qwen_2.5_vl_7b_fp8_scaled.safetensors", "qwen_image", _QWEN, (0, 560))
    vae = _vae(graph, "qwen_image_vae.safetensors", _QWEN, (0, 740))
    (empty,) = graph.add("EmptySD3LatentImage", (800, 560), (340, 120), width=1328, height=1328)
    sampled = _sampler(graph, (1190, 0), model, positive=positive, negative=negative, latent_image=empty)
    (images,) = graph.add("VAEDecode", (1580, 0), (240, 60), samples=sampled, vae=vae)
    graph.add("SaveImage", (1580, 120), (340, 340), images=images, filename_prefix=f"phased/{prefix}")
    _report(graph, (1190, 620), model)
    graph.note(note, (380, 240), (360, 280))


def qwen_image(graph: Graph) -> None:
    base = _network(graph, "qwen_image_fp8_e4m3fn.safetensors", (0, 0), _QWEN)
    model, _ = graph.add("PhasedDMDLoadExperts", (800, 0), (340, 300), experts="qwen_image_phased", base_1=base)
    _qwen_image(
        graph,
        model,
        "qwen_image",
        "## Qwen-Image, two phase experts, 4 steps\n\nPut your experts folder (`phased_experts.json` and its files) "
        "into `models/phased_experts/qwen_image_phased`, or pick another one in **Load Phased Experts**, or choose "
        "`(Hub id)` and write `user/name`. Plan, guidance and base are read from the folder, so nothing else has to be "
        "set.\n\nThe recipe `qwen_image_phased` of this repository trains such experts; none come with it. To try a "
        "released few-step LoRA instead, open *qwen image lightning*.",
    )


def qwen_image_lightning(graph: Graph) -> None:
    lora = "Qwen-Image-Lightning-4steps-V1.0.safetensors"
    base = _network(graph, "qwen_image_fp8_e4m3fn.safetensors", (0, 0), _QWEN)
    plan = _plan(graph, (380, 0), "4", 3.0)
    models = [{"name": lora, "url": f"{_HUB}/lightx2v/Qwen-Image-Lightning/resolve/main/{lora}", "directory": "loras"}]
    (model,) = graph.add(
        "PhasedDMDExpertsLoRA", (800, 0), (340, 400), models=models, model=base, plan=plan, cfg="1", lora_1=lora
    )
    _qwen_image(
        graph,
        model,
        "qwen_image_lightning",
        "## Qwen-Image-Lightning, 4 steps\n\nThis released LoRA was distilled without phases: one LoRA for all steps, "
        "a plan of **one phase**. What the nodes add is that it runs on exactly the sigmas it was trained on (shift 3, "
        "whatever the resolution).\n\nThe file for 8 steps: steps `8` in the plan, and the LoRA of that name.\n\nWith "
        "an expert for each phase: steps `2, 2` and a second LoRA, or *qwen image*.",
    )


def _wan21_loras(graph: Graph, steps: str, names: str, loras: list[str], text: str) -> None:
    base = _network(graph, "wan2.1_t2v_1.3B_fp16.safetensors", (0, 0), _WAN21)
    plan = _plan(graph, (380, 0), steps, 5.0, names)
    chosen = {f"lora_{k + 1}": name for k, name in enumerate(loras)}
    (model,) = graph.add("PhasedDMDExpertsLoRA", (800, 0), (340, 400), model=base, plan=plan, cfg="1", **chosen)
    positive, negative = _text(graph, "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan", _WAN21, (0, 620))
    vae = _vae(graph, "wan_2.1_vae.safetensors", _WAN22, (0, 800))
    (empty,) = graph.add("EmptyHunyuanLatentVideo", (800, 620), (340, 160), width=832, height=480, length=81)
    sampled = _sampler(graph, (1190, 0), model, positive=positive, negative=negative, latent_image=empty)
    _video(graph, (1580, 0), sampled, vae, "phased/wan21")
    _report(graph, (1190, 620), model)
    graph.note(text, (380, 240), (360, 340))


def lora_on_one_base(graph: Graph) -> None:
    _wan21_loras(
        graph,
        "2, 2",
        "high_noise, low_noise",
        ["high_noise.safetensors", "low_noise.safetensors"],
        "## A LoRA for each phase on one base\n\nThe base is in memory once; at the boundary one LoRA goes and "
        "the next "
        "comes.\n\nPut the two files of your experts folder (the `experts/` that a distillation writes) into "
        "`models/loras`. Or put the whole folder into `models/phased_experts` and use **Load Phased Experts** "
        "in place of "
        "plan and LoRAs: it reads the plan from the folder.",
    )


def three_experts(graph: Graph) -> None:
    names = ["high_noise", "middle_noise", "low_noise"]
    _wan21_loras(
        graph,
        "1, 1, 2",
        ", ".join(names),
        [f"{name}.safetensors" for name in names],
        "## Three experts\n\nAs many phases as you like: here one step, one step, two steps. Each LoRA was "
        "distilled for "
        "its phase of this plan.\n\nThe report at the lower right says which expert runs which step; connect SIGMAS of "
        "another scheduler to it to see what would go wrong.",
    )


def tiny_on_cpu(graph: Graph) -> None:
    model, clip, vae = graph.add("PhasedDMDLoadDiffusersFolder", (0, 0), (330, 130), folder="teacher", tokens=16)
    experts, _ = graph.add(
        "PhasedDMDLoadExperts", (0, 190), (330, 300), experts="embedded/models/experts", base_1=model
    )
    (positive,) = graph.add(
        "CLIPTextEncode", (380, 0), (360, 120), "Prompt", clip=clip, text="a panda on a blue background"
    )
    (negative,) = graph.add("CLIPTextEncode", (380, 170), (360, 80), "Negative prompt", clip=clip, text="")
    (empty,) = graph.add("EmptyHunyuanLatentVideo", (380, 300), (360, 160), width=64, height=64, length=1, batch_size=4)
    sampled = _sampler(graph, (790, 0), experts, positive=positive, negative=negative, latent_image=empty)
    (images,) = graph.add("VAEDecode", (1180, 0), (340, 60), samples=sampled, vae=vae)
    (large,) = graph.add(
        "ImageScaleBy", (1180, 110), (340, 110), image=images, upscale_method="nearest-exact", scale_by=4.0
    )
    graph.add("SaveImage", (1180, 270), (340, 430), images=large, filename_prefix="phased/tiny")
    _report(graph, (790, 620), experts)
    graph.note(
        "## Tiny, on a CPU\n\nThe teacher that the Phased DMD repository ships, with its phase experts: four "
        "pictures of 64 "
        "pixels (shown four times as large) in 4 steps, in seconds, without a GPU. Needs a clone of the repository in "
        "`custom_nodes`.\n\nPrompts: *a "
        "rocket on a black background*, *a cat moves left on a white background* (length 9 for a clip) ...",
        (0, 540),
        (740, 200),
    )


WORKFLOWS: dict[str, tuple[Callable[[Graph], None], list[int], float]] = {
    "phased_tiny_on_cpu": (tiny_on_cpu, [2, 2], 5.0),
    "phased_wan22_t2v": (wan22_t2v, [2, 2], 5.0),
    "phased_wan22_i2v": (wan22_i2v, [2, 2], 5.0),
    "phased_wan22_undistilled_first_step": (wan22_undistilled_first_step, [1, 1, 2], 5.0),
    "phased_qwen_image": (qwen_image, [2, 2], 3.0),
    "phased_qwen_image_lightning": (qwen_image_lightning, [4], 3.0),
    "phased_lora_on_one_base": (lora_on_one_base, [2, 2], 5.0),
    "phased_three_experts": (three_experts, [1, 1, 2], 5.0),
}
"""File name to its graph and the plan on its thumbnail: steps of each phase and shift."""

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


def _preset(graph: Graph, at: tuple[int, int], preset: str) -> Output:
    return graph.add("PhasedDMDPlanFromPreset", at, (360, 220), preset=preset)[0]


def _sampler(graph: Graph, at: tuple[int, int], model: Output, **inputs: Any) -> Output:
    usual = {"seed": 1, "steps": 0, "cfg": 1.0, "sampler_name": "euler"}
    return graph.add("PhasedDMDSampler", at, (340, 560), model=model, **{**usual, **inputs})[0]


def _video(graph: Graph, at: tuple[int, int], latent: Output, vae: Output, prefix: str) -> None:
    (images,) = graph.add("VAEDecode", at, (240, 60), samples=latent, vae=vae)
    (video,) = graph.add("CreateVideo", (at[0], at[1] + 110), (240, 80), images=images, fps=16.0)
    graph.add("SaveVideo", (at[0], at[1] + 270), (340, 340), video=video, filename_prefix=prefix)


def _report(graph: Graph, at: tuple[int, int], model: Output) -> None:
    graph.add("PhasedDMDPlanReport", at, (460, 340), model=model)


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
    graph.note(f"## Wan2.2 text to video, 4 steps\n\n{first if plain_first else usual}", (380, 300), (360, 300))


def wan22_boundary(graph: Graph) -> None:
    parts = [f"wan2.2_t2v_{part}_noise_14B_fp8_scaled.safetensors" for part in ("high", "low")]
    high, low = (_network(graph, name, (0, 150 * n), _WAN22) for n, name in enumerate(parts))
    plan = graph.add("PhasedDMDPlanFromBoundary", (380, 0), (360, 250), boundary="0.875", steps=20, shift="8")[0]
    common = {"plan": plan, "cfg": "3.5", "set_shift": True, "model_1": high, "model_2": low}
    (model,) = graph.add("PhasedDMDExperts", (800, 0), (340, 300), **common)
    positive, negative = _text(graph, "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan", _WAN21, (0, 620))
    vae = _vae(graph, "wan_2.1_vae.safetensors", _WAN22, (0, 800))
    (empty,) = graph.add("EmptyHunyuanLatentVideo", (800, 760), (340, 160), width=640, height=640, length=81)
    sampled = _sampler(graph, (1190, 0), model, positive=positive, negative=negative, latent_image=empty)
    _video(graph, (1580, 0), sampled, vae, "phased/wan22")
    _report(graph, (1190, 620), model)
    graph.note(
        "## Wan2.2 as it was released\n\nNo few-step LoRAs: 20 steps with guidance 3.5. The networks hand over at "
        "sigma **0.875**, where they were trained to (image to video: 0.9), whatever steps and shift are.\n\nDrag the "
        "line on the plan's time line to move the hand-over.",
        (380, 290),
        (360, 260),
    )


def wan22_first_last_frame(graph: Graph) -> None:
    model = _wan22(graph, "i2v", "v1")
    positive, negative = _text(graph, "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan", _WAN21, (0, 620))
    vae = _vae(graph, "wan_2.1_vae.safetensors", _WAN22, (0, 800))
    frames = [graph.add("LoadImage", (380 * n, 920), (330, 320), title)[0] for n, title in enumerate(("First", "Last"))]
    size = {"width": 640, "height": 640, "length": 81, "batch_size": 1}
    inputs = {"positive": positive, "negative": negative, "vae": vae, "start_image": frames[0], "end_image": frames[1]}
    ready = graph.add("WanFirstLastFrameToVideo", (800, 660), (340, 230), **inputs, **size)
    sampled = _sampler(graph, (1190, 0), model, positive=ready[0], negative=ready[1], latent_image=ready[2])
    _video(graph, (1580, 0), sampled, vae, "phased/wan22_flf2v")
    _report(graph, (1190, 620), model)
    graph.note(
        "## Wan2.2, from a first to a last frame, 4 steps\n\nChoose both frames below. Both networks are one MODEL; "
        "the hand-over is at sigma 0.8333, exactly where the 4-step LoRAs were trained to hand over.",
        (380, 300),
        (360, 260),
    )


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
        (380, 300),
        (360, 260),
    )


def _picture(graph: Graph, model: Output, prefix: str, note: str, **inputs: Any) -> None:
    """From the MODEL with its experts to a saved picture."""
    vae = inputs.pop("vae")
    sampled = _sampler(graph, (1190, 0), model, **inputs)
    (images,) = graph.add("VAEDecode", (1580, 0), (240, 60), samples=sampled, vae=vae)
    graph.add("SaveImage", (1580, 120), (340, 340), images=images, filename_prefix=f"phased/{prefix}")
    _report(graph, (1190, 620), model)
    graph.note(note, (380, 250), (360, 280))


def _lightning(graph: Graph, base: Output, repository: str, lora: str, preset: str) -> Output:
    """A released LoRA of one network on the sigmas that it was trained on."""
    models = [{"name": lora, "url": f"{_HUB}/lightx2v/{repository}/resolve/main/{lora}", "directory": "loras"}]
    plan = _preset(graph, (380, 0), preset)
    chosen = {"models": models, "model": base, "plan": plan, "cfg": "1", "lora_1": lora}
    return graph.add("PhasedDMDExpertsLoRA", (800, 0), (340, 500), **chosen)[0]


_QWEN_TEXT = ("qwen_2.5_vl_7b_fp8_scaled.safetensors", "qwen_image", _QWEN)


def _qwen_image_lightning(graph: Graph, version: str, base: str, lora: str, note: str) -> None:
    repository = f"Qwen-Image{version}-Lightning"
    preset = f"qwen-image{version}-lightning-4step"
    model = _lightning(graph, _network(graph, base, (0, 0), _QWEN), repository, lora, preset)
    positive, negative = _text(graph, *_QWEN_TEXT, (0, 620))
    vae = _vae(graph, "qwen_image_vae.safetensors", _QWEN, (0, 800))
    (empty,) = graph.add("EmptySD3LatentImage", (800, 620), (340, 120), width=1328, height=1328)
    inputs = {"positive": positive, "negative": negative, "latent_image": empty, "vae": vae}
    _picture(graph, model, f"qwen_image{version.replace('-', '_')}", note, **inputs)


def qwen_image_lightning(graph: Graph) -> None:
    _qwen_image_lightning(
        graph,
        "",
        "qwen_image_fp8_e4m3fn.safetensors",
        "Qwen-Image-Lightning-4steps-V1.0.safetensors",
        "## Qwen-Image-Lightning, 4 steps\n\nThis released LoRA was distilled without phases: one LoRA for all steps, "
        "a plan of **one phase**. What the nodes add is that it runs on exactly the sigmas it was trained on (shift 3, "
        "whatever the resolution).\n\nThe file for 8 steps: preset `qwen-image-lightning-8step`, and the LoRA of that "
        "name.\n\nExperts of your own from a folder or the Hub: **Load Phased Experts** in the place of plan and LoRA; "
        "it reads the plan from the folder.",
    )


def qwen_image_2512_lightning(graph: Graph) -> None:
    _qwen_image_lightning(
        graph,
        "-2512",
        "qwen_image_2512_fp8_e4m3fn.safetensors",
        "Qwen-Image-2512-Lightning-4steps-V1.0-fp32.safetensors",
        "## Qwen-Image-2512, 4 steps\n\nThe Lightning LoRA of the December version, on exactly the sigmas it was "
        "trained on: shift 3, 4 steps, no guidance.",
    )


def qwen_image_edit_2511_lightning(graph: Graph) -> None:
    base = "qwen_image_edit_2511_fp8mixed.safetensors"
    network = _network(graph, base, (0, 0), f"{_HUB}/Comfy-Org/Qwen-Image-Edit_ComfyUI/resolve/main/split_files")
    lora = "Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16.safetensors"
    preset = "qwen-image-edit-2511-lightning-4step"
    model = _lightning(graph, network, "Qwen-Image-Edit-2511-Lightning", lora, preset)
    encoder, kind, source = _QWEN_TEXT
    vae = _vae(graph, "qwen_image_vae.safetensors", _QWEN, (0, 160))
    (clip,) = graph.add(
        "CLIPLoader",
        (0, 300),
        clip_name=encoder,
        type=kind,
        device="default",
        **_file(source, "text_encoders", encoder),
    )
    image, _ = graph.add("LoadImage", (0, 480), (330, 320))
    (scaled,) = graph.add("FluxKontextImageScale", (380, 600), (330, 60), image=image)
    prompts = []
    for n, text in enumerate(("Make it a watercolour painting.", "")):
        inputs = {"clip": clip, "vae": vae, "image1": scaled, "prompt": text}
        (encoded,) = graph.add("TextEncodeQwenImageEditPlus", (380, 720 + 200 * n), (360, 160), **inputs)
        method = {"conditioning": encoded, "reference_latents_method": "index_timestep_zero"}
        prompts += graph.add("FluxKontextMultiReferenceLatentMethod", (800, 720 + 200 * n), (340, 80), **method)
    (latent,) = graph.add("VAEEncode", (800, 600), (240, 60), pixels=scaled, vae=vae)
    _picture(
        graph,
        model,
        "qwen_image_edit",
        "## Qwen-Image-Edit 2511, 4 steps\n\nChoose an image at the lower left and say what to change. The Lightning "
        "LoRA runs on exactly the sigmas it was trained on: shift 3, 4 steps, no guidance.",
        positive=prompts[0],
        negative=prompts[1],
        latent_image=latent,
        vae=vae,
    )


def z_image_turbo(graph: Graph) -> None:
    source = f"{_HUB}/Comfy-Org/z_image_turbo/resolve/main/split_files"
    network = _network(graph, "z_image_turbo_bf16.safetensors", (0, 0), source)
    plan = _preset(graph, (380, 0), "z-image-turbo")
    common = {"plan": plan, "cfg": "1", "model_1": network}
    (model,) = graph.add("PhasedDMDExperts", (800, 0), (340, 300), **common)
    positive, negative = _text(graph, "qwen_3_4b.safetensors", "lumina2", source, (0, 560))
    vae = _vae(graph, "ae.safetensors", source, (0, 740))
    (empty,) = graph.add("EmptySD3LatentImage", (800, 560), (340, 120), width=1024, height=1024)
    _picture(
        graph,
        model,
        "z_image_turbo",
        "## Z-Image-Turbo, 8 steps\n\nA whole model that was distilled without phases: a plan of **one phase**, shift "
        "3, no guidance. LoRAs of your own go between Phased Experts and the sampler.",
        positive=positive,
        negative=negative,
        latent_image=empty,
        vae=vae,
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
    _report(graph, (790, 740), experts)
    graph.note(
        "## Tiny, on a CPU\n\nThe teacher that the Phased DMD repository ships, with its phase experts: four "
        "pictures of 64 pixels (shown four times as large) in 4 steps, in seconds, without a GPU and a download."
        "\n\nPrompts: *a "
        "rocket on a black background*, *a cat moves left on a white background* (length 9 for a clip) ...",
        (0, 540),
        (740, 200),
    )


WORKFLOWS: dict[str, tuple[Callable[[Graph], None], list[int], float]] = {
    "phased_tiny_on_cpu": (tiny_on_cpu, [2, 2], 5.0),
    "phased_wan22_t2v": (wan22_t2v, [2, 2], 5.0),
    "phased_wan22_i2v": (wan22_i2v, [2, 2], 5.0),
    "phased_wan22_first_last_frame": (wan22_first_last_frame, [2, 2], 5.0),
    "phased_wan22_undistilled_first_step": (wan22_undistilled_first_step, [1, 1, 2], 5.0),
    "phased_wan22_boundary": (wan22_boundary, [5, 5], 8.0),
    "phased_qwen_image_lightning": (qwen_image_lightning, [4], 3.0),
    "phased_qwen_image_2512_lightning": (qwen_image_2512_lightning, [4], 3.0),
    "phased_qwen_image_edit_2511_lightning": (qwen_image_edit_2511_lightning, [4], 3.0),
    "phased_z_image_turbo": (z_image_turbo, [8], 3.0),
}
"""File name to its graph and the plan on its thumbnail: steps of each phase and shift."""

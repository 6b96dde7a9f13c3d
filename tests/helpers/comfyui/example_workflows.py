"""The example workflows, in words of their nodes; ``write_assets`` makes ``workflows/`` of them.

Columns go from left to right, and so does every link.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pdmd_core.phases import PhasePlan
from tests.helpers.comfyui.example_parts import (
    HUB,
    NOTE,
    autoencoder,
    experts_of,
    hub_file,
    hub_model,
    network,
    phased_sampler,
    plan_of_preset,
    plan_of_steps,
    plan_report,
    prompts,
    text_encoder,
)
from tests.helpers.comfyui.graphs import Graph, Output

_WAN22 = f"{HUB}/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
_WAN21 = f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
_QWEN = f"{HUB}/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files"
_LTX2 = f"{HUB}/Lightricks/LTX-2/resolve/main"


def _wan22_networks(graph: Graph, names: list[str], loras: list[str] | None = None) -> list[Output]:
    found = []
    for k, name in enumerate(names):
        found += [network(graph, name, (0, 160 * k), _WAN22, loras[k] if loras else None)]
    return found


def _wan22_inputs(graph: Graph) -> tuple[Output, Output, Output]:
    """VAE and prompts."""
    vae = autoencoder(graph, "wan_2.1_vae.safetensors", _WAN22, (0, 320))
    clip = text_encoder(graph, "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan", _WAN21, (0, 460))
    return vae, *prompts(graph, clip, (380, 680))


def _wan22_parts(task: str, version: str) -> tuple[list[str], list[str]]:
    """Files of the two networks, and of their 4-step LoRAs."""
    parts = [f"wan2.2_{task}_{part}_noise_14B_fp8_scaled.safetensors" for part in ("high", "low")]
    loras = [f"wan2.2_{task}_lightx2v_4steps_lora_{version}_{part}_noise.safetensors" for part in ("high", "low")]
    return parts, loras


def _wan22_end(graph: Graph, model: Output, vae: Output, prefix: str, **inputs: Any) -> None:
    with graph.group("Sampling"):
        sampled = phased_sampler(graph, (1230, 0), model, **inputs)
        plan_report(graph, (1230, 660), model)
    with graph.group("Clip"):
        (images,) = graph.add("VAEDecode", (1770, 0), (240, 60), samples=sampled, vae=vae)
        (video,) = graph.add("CreateVideo", (2060, 0), (240, 110), images=images, fps=16.0)
        graph.add("SaveVideo", (2350, 0), (340, 340), video=video, filename_prefix=prefix)


_SIZE = {"width": 640, "height": 640, "length": 81}


def wan22_t2v(graph: Graph) -> None:
    graph.note(
        "## Wan2.2 text to video, 4 steps\n\nWan2.2's two networks as **one MODEL**: one sampler, one progress bar, no "
        "steps to split. The hand-over is at sigma 0.8333, exactly where the 4-step LoRAs were trained to hand over."
        "\n\n- More motion: see the workflow with an undistilled first step.\n- LoRAs of your own go between Phased "
        "Experts and the sampler: they are put onto both networks.\n- Any sampler takes this MODEL. With KSampler: "
        "scheduler `simple`, 4 steps.",
        NOTE,
        (370, 340),
    )
    with graph.group("Models and prompts"):
        networks = _wan22_networks(graph, *_wan22_parts("t2v", "v1.1"))
        vae, positive, negative = _wan22_inputs(graph)
        plan = plan_of_steps(graph, (380, 360), "2, 2", 5.0)
    with graph.group("Both networks, and the size"):
        model = experts_of(graph, (820, 0), plan, "1", *networks)
        (empty,) = graph.add("EmptyHunyuanLatentVideo", (820, 400), (340, 160), **_SIZE)
    _wan22_end(graph, model, vae, "phased/wan22", positive=positive, negative=negative, latent_image=empty)


def wan22_undistilled_first_step(graph: Graph) -> None:
    graph.note(
        "## Wan2.2, more motion\n\nThe first step runs **without** the few-step LoRA and **with** guidance (cfg 3.5): "
        "it decides the motion, which distilled models have less of. The sigmas are those of the usual four steps; "
        "`1, 1, 2` only gives the first one to a phase of its own.\n\nEverything after it is the distilled 4-step "
        "model at cfg 1.",
        NOTE,
        (370, 300),
    )
    with graph.group("Models and prompts"):
        networks = _wan22_networks(graph, *_wan22_parts("t2v", "v1.1"))
        vae, positive, negative = _wan22_inputs(graph)
        plan = plan_of_steps(graph, (380, 360), "1, 1, 2", 5.0, "undistilled, high_noise, low_noise")
    with graph.group("Three experts, and the size"):
        plain = Output(networks[0].node - 1, 0, "MODEL")
        model = experts_of(graph, (820, 0), plan, "3.5, 1, 1", plain, *networks)
        (empty,) = graph.add("EmptyHunyuanLatentVideo", (820, 400), (340, 160), **_SIZE)
    _wan22_end(graph, model, vae, "phased/wan22", positive=positive, negative=negative, latent_image=empty)


def wan22_boundary(graph: Graph) -> None:
    graph.note(
        "## Wan2.2 as it was released\n\nNo few-step LoRAs: 20 steps with guidance 3.5. The networks hand over at "
        "sigma **0.875**, where they were trained to (image to video: 0.9), whatever steps and shift are.\n\nDrag the "
        "line on the plan's time line to move the hand-over.",
        NOTE,
        (370, 260),
    )
    with graph.group("Models and prompts"):
        networks = _wan22_networks(graph, _wan22_parts("t2v", "")[0])
        vae, positive, negative = _wan22_inputs(graph)
        (plan,) = graph.add(
            "PhasedDMDPlanFromBoundary", (380, 0), (360, 250), boundary="0.875", steps=20, shift="8", names=""
        )
    with graph.group("Both networks, and the size"):
        model = experts_of(graph, (820, 0), plan, "3.5", *networks)
        (empty,) = graph.add("EmptyHunyuanLatentVideo", (820, 400), (340, 160), **_SIZE)
    _wan22_end(graph, model, vae, "phased/wan22", positive=positive, negative=negative, latent_image=empty)


def _wan22_from_pictures(graph: Graph, note: str, node: str, pictures: dict[str, str], prefix: str) -> None:
    graph.note(note, NOTE, (370, 260))
    with graph.group("Models and prompts"):
        networks = _wan22_networks(graph, *_wan22_parts("i2v", "v1"))
        vae, positive, negative = _wan22_inputs(graph)
        plan = plan_of_steps(graph, (380, 360), "2, 2", 5.0)
    with graph.group("Pictures"):
        chosen = {
            name: graph.add("LoadImage", (380 * n, 1110), (330, 320), title)[0]
            for n, (name, title) in enumerate(pictures.items())
        }
    with graph.group("Both networks, and the size"):
        model = experts_of(graph, (820, 0), plan, "1", *networks)
        inputs = {"positive": positive, "negative": negative, "vae": vae, **chosen, **_SIZE, "batch_size": 1}
        ready = graph.add(node, (820, 400), (340, 240), **inputs)
    inputs = {"positive": ready[0], "negative": ready[1], "latent_image": ready[2]}
    _wan22_end(graph, model, vae, prefix, **inputs)


def wan22_i2v(graph: Graph) -> None:
    _wan22_from_pictures(
        graph,
        "## Wan2.2 image to video, 4 steps\n\nChoose a start image at the lower left. Both networks are one MODEL; the "
        "hand-over is at sigma 0.8333, exactly where the 4-step LoRAs were trained to hand over.",
        "WanImageToVideo",
        {"start_image": "First picture"},
        "phased/wan22_i2v",
    )


def wan22_first_last_frame(graph: Graph) -> None:
    _wan22_from_pictures(
        graph,
        "## Wan2.2 from first to last frame, 4 steps\n\nChoose two images at the lower left. The image-to-video "
        "networks with their 4-step LoRAs are one MODEL; the hand-over is at sigma 0.8333.",
        "WanFirstLastFrameToVideo",
        {"start_image": "First picture", "end_image": "Last picture"},
        "phased/wan22_flf2v",
    )


def _picture(graph: Graph, model: Output, vae: Output, prefix: str, x: int = 1230, **inputs: Any) -> None:
    """From the MODEL with its experts to a saved picture."""
    with graph.group("Sampling"):
        sampled = phased_sampler(graph, (x, 0), model, **inputs)
        plan_report(graph, (x, 660), model)
    with graph.group("Picture"):
        (images,) = graph.add("VAEDecode", (x + 540, 0), (240, 60), samples=sampled, vae=vae)
        graph.add("SaveImage", (x + 830, 0), (340, 340), images=images, filename_prefix=f"phased/{prefix}")


def _lightning(graph: Graph, at: tuple[int, int], base: Output, plan: Output, repository: str, lora: str) -> Output:
    """A released LoRA of one network on the sigmas that it was trained on."""
    models = [hub_model(f"{HUB}/lightx2v/{repository}/resolve/main", "loras", lora)]
    chosen = {"models": models, "model": base, "plan": plan, "cfg": "1", "lora_1": lora}
    return graph.add("PhasedDMDExpertsLoRA", at, (340, 500), **chosen)[0]


_QWEN_TEXT = ("qwen_2.5_vl_7b_fp8_scaled.safetensors", "qwen_image", _QWEN)


def _qwen_image_lightning(graph: Graph, version: str, base: str, lora: str, note: str) -> None:
    graph.note(note, NOTE, (370, 340))
    with graph.group("Models and prompts"):
        bare = network(graph, base, (0, 0), _QWEN)
        vae = autoencoder(graph, "qwen_image_vae.safetensors", _QWEN, (0, 160))
        clip = text_encoder(graph, *_QWEN_TEXT, (0, 300))
        plan = plan_of_preset(graph, (380, 0), f"qwen-image{version}-lightning-4step")
        positive, negative = prompts(graph, clip, (380, 320))
    with graph.group("The LoRA as an expert, and the size"):
        model = _lightning(graph, (820, 0), bare, plan, f"Qwen-Image{version}-Lightning", lora)
        (empty,) = graph.add("EmptySD3LatentImage", (820, 600), (340, 120), width=1328, height=1328)
    inputs = {"positive": positive, "negative": negative, "latent_image": empty}
    _picture(graph, model, vae, f"qwen_image{version.replace('-', '_')}", **inputs)


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
    graph.note(
        "## Qwen-Image-Edit 2511, 4 steps\n\nChoose an image at the lower left and say what to change. The Lightning "
        "LoRA runs on exactly the sigmas it was trained on: shift 3, 4 steps, no guidance.",
        NOTE,
        (370, 260),
    )
    base = "qwen_image_edit_2511_fp8mixed.safetensors"
    source = f"{HUB}/Comfy-Org/Qwen-Image-Edit_ComfyUI/resolve/main/split_files"
    lora = "Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16.safetensors"
    with graph.group("Models and the picture"):
        bare = network(graph, base, (0, 0), source)
        vae = autoencoder(graph, "qwen_image_vae.safetensors", _QWEN, (0, 160))
        clip = text_encoder(graph, *_QWEN_TEXT, (0, 300))
        image, _ = graph.add("LoadImage", (0, 490), (330, 320))
        plan = plan_of_preset(graph, (380, 0), "qwen-image-edit-2511-lightning-4step")
        (scaled,) = graph.add("FluxKontextImageScale", (380, 490), (330, 60), image=image)
    with graph.group("The LoRA as an expert, and what to change"):
        model = _lightning(graph, (820, 0), bare, plan, "Qwen-Image-Edit-2511-Lightning", lora)
        prompts = []
        for n, text in enumerate(("Make it a watercolour painting.", "")):
            inputs = {"clip": clip, "vae": vae, "image1": scaled, "prompt": text}
            (encoded,) = graph.add("TextEncodeQwenImageEditPlus", (820, 600 + 240 * n), (360, 190), **inputs)
            method = {"conditioning": encoded, "reference_latents_method": "index_timestep_zero"}
            prompts += graph.add("FluxKontextMultiReferenceLatentMethod", (1230, 600 + 240 * n), (340, 80), **method)
        (latent,) = graph.add("VAEEncode", (1230, 480), (240, 60), pixels=scaled, vae=vae)
    inputs = {"positive": prompts[0], "negative": prompts[1], "latent_image": latent}
    _picture(graph, model, vae, "qwen_image_edit", 1640, **inputs)


def z_image_turbo(graph: Graph) -> None:
    graph.note(
        "## Z-Image-Turbo, 8 steps\n\nA whole model that was distilled without phases: a plan of **one phase**, shift "
        "3, no guidance. LoRAs of your own go between Phased Experts and the sampler.",
        NOTE,
        (370, 260),
    )
    source = f"{HUB}/Comfy-Org/z_image_turbo/resolve/main/split_files"
    with graph.group("Models and prompts"):
        whole = network(graph, "z_image_turbo_bf16.safetensors", (0, 0), source)
        vae = autoencoder(graph, "ae.safetensors", source, (0, 160))
        clip = text_encoder(graph, "qwen_3_4b.safetensors", "lumina2", source, (0, 300))
        plan = plan_of_preset(graph, (380, 0), "z-image-turbo")
        positive, negative = prompts(graph, clip, (380, 320))
    with graph.group("The network, and the size"):
        model = experts_of(graph, (820, 0), plan, "1", whole)
        (empty,) = graph.add("EmptySD3LatentImage", (820, 400), (340, 120), width=1024, height=1024)
    inputs = {"positive": positive, "negative": negative, "latent_image": empty}
    _picture(graph, model, vae, "z_image_turbo", **inputs)


def ltx2_distilled(graph: Graph) -> None:
    graph.note(
        "## LTX-2 distilled, 8 + 3 steps\n\nPicture and sound of a whole distilled model on the sigmas that it was "
        "distilled for: preset `ltx2-distilled`, no guidance. The second stage samples a latent of twice the size on "
        "the last three of them: **Phased Sigmas**, split after five steps.",
        NOTE,
        (370, 300),
    )
    name, text, upscaler = (
        "ltx-2-19b-distilled.safetensors",
        "gemma_3_12B_it_fp4_mixed.safetensors",
        "ltx-2-spatial-upscaler-x2-1.0.safetensors",
    )
    checkpoint = hub_model(_LTX2, "checkpoints", name)
    encoder = hub_file(f"{HUB}/Comfy-Org/ltx-2/resolve/main/split_files", "text_encoders", text)["models"]
    larger = hub_model(_LTX2, "latent_upscale_models", upscaler)
    frames, rate = 121, 24.0
    with graph.group("Models, prompts and size"):
        whole, _, vae = graph.add("CheckpointLoaderSimple", (0, 0), (330, 110), ckpt_name=name, models=[checkpoint])
        (sounds,) = graph.add("LTXVAudioVAELoader", (0, 180), (330, 70), ckpt_name=name, models=[checkpoint])
        loader = {"text_encoder": text, "ckpt_name": name, "device": "default", "models": [*encoder, checkpoint]}
        (clip,) = graph.add("LTXAVTextEncoderLoader", (0, 320), (330, 120), **loader)
        (upscale,) = graph.add("LatentUpscaleModelLoader", (0, 510), (330, 70), model_name=upscaler, models=[larger])
        plan = plan_of_preset(graph, (380, 0), "ltx2-distilled")
        positive, negative = prompts(graph, clip, (380, 320))
        size = {"width": 640, "height": 352, "length": frames, "batch_size": 1}
        (picture,) = graph.add("EmptyLTXVLatentVideo", (380, 680), (360, 150), **size)
        length = {"frames_number": frames, "frame_rate": rate, "batch_size": 1}
        (sound,) = graph.add("LTXVEmptyLatentAudio", (380, 900), (360, 130), audio_vae=sounds, **length)
    with graph.group("First stage: all eight steps"):
        model = experts_of(graph, (820, 0), plan, "1", whole)
        texts = {"positive": positive, "negative": negative, "frame_rate": rate}
        positive, negative = graph.add("LTXVConditioning", (820, 400), (340, 100), **texts)
        (latent,) = graph.add("LTXVConcatAVLatent", (820, 680), (340, 60), video_latent=picture, audio_latent=sound)
        inputs = {"positive": positive, "negative": negative, "latent_image": latent}
        sampled = phased_sampler(graph, (1230, 0), model, sampler_name="euler_ancestral", **inputs)
        plan_report(graph, (1230, 660), model)
    with graph.group("Second stage: twice the size, the last three steps"):
        picture, sound = graph.add("LTXVSeparateAVLatent", (1770, 0), (240, 60), av_latent=sampled)
        larger_inputs = {"samples": picture, "upscale_model": upscale, "vae": vae}
        (picture,) = graph.add("LTXVLatentUpsampler", (2060, 0), (260, 80), **larger_inputs)
        (latent,) = graph.add("LTXVConcatAVLatent", (2370, 0), (240, 60), video_latent=picture, audio_latent=sound)
        (sigmas,) = graph.add("PhasedDMDSigmas", (1770, 160), (340, 230), plan=plan)
        _, last = graph.add("SplitSigmas", (2160, 160), (240, 80), sigmas=sigmas, step=5)
        guided = {"model": model, "positive": positive, "negative": negative, "cfg": 1.0}
        (guider,) = graph.add("CFGGuider", (2160, 310), (260, 110), **guided)
        (sampler,) = graph.add("KSamplerSelect", (2160, 490), (260, 70), sampler_name="euler_ancestral")
        (noise,) = graph.add("RandomNoise", (2160, 630), (260, 90), noise_seed=2)
        parts = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": last, "latent_image": latent}
        sampled, _ = graph.add("SamplerCustomAdvanced", (2660, 0), (260, 130), **parts)
    with graph.group("Clip"):
        picture, sound = graph.add("LTXVSeparateAVLatent", (2990, 0), (240, 60), av_latent=sampled)
        tiles = {"tile_size": 512, "overlap": 64, "temporal_size": 4096, "temporal_overlap": 8}
        (images,) = graph.add("VAEDecodeTiled", (3280, 0), (260, 160), samples=picture, vae=vae, **tiles)
        (audio,) = graph.add("LTXVAudioVAEDecode", (3280, 230), (260, 60), samples=sound, audio_vae=sounds)
        (video,) = graph.add("CreateVideo", (3590, 0), (240, 110), images=images, audio=audio, fps=rate)
        graph.add("SaveVideo", (3880, 0), (340, 340), video=video, filename_prefix="phased/ltx2")


def tiny_on_cpu(graph: Graph) -> None:
    graph.note(
        "## Tiny, on a CPU\n\nThe teacher that the Phased DMD repository ships, with its phase experts: four "
        "pictures of 64 pixels (shown four times as large) in 4 steps, in seconds, without a GPU and a download."
        "\n\nPrompts: *a "
        "rocket on a black background*, *a cat moves left on a white background* (length 9 for a clip) ...",
        NOTE,
        (370, 280),
    )
    with graph.group("Teacher, experts, prompts and size"):
        model, clip, vae = graph.add("PhasedDMDLoadDiffusersFolder", (0, 0), (330, 130), folder="teacher", tokens=16)
        experts, _ = graph.add(
            "PhasedDMDLoadExperts", (380, 0), (360, 330), experts="embedded/models/experts", base_1=model
        )
        (positive,) = graph.add(
            "CLIPTextEncode", (380, 420), (360, 120), "Prompt", clip=clip, text="a panda on a blue background"
        )
        (negative,) = graph.add("CLIPTextEncode", (380, 600), (360, 90), "Negative prompt", clip=clip, text="")
        size = {"width": 64, "height": 64, "length": 1, "batch_size": 4}
        (empty,) = graph.add("EmptyHunyuanLatentVideo", (380, 760), (360, 160), **size)
    with graph.group("Sampling"):
        inputs = {"positive": positive, "negative": negative, "latent_image": empty}
        sampled = phased_sampler(graph, (820, 0), experts, **inputs)
        plan_report(graph, (820, 660), experts)
    with graph.group("Pictures"):
        (images,) = graph.add("VAEDecode", (1360, 0), (240, 60), samples=sampled, vae=vae)
        (large,) = graph.add(
            "ImageScaleBy", (1650, 0), (300, 110), image=images, upscale_method="nearest-exact", scale_by=4.0
        )
        graph.add("SaveImage", (2000, 0), (380, 430), images=large, filename_prefix="phased/tiny")


_TWO_AND_TWO = PhasePlan.preset("wan2.2-lightx2v-4step")
WORKFLOWS: dict[str, tuple[Callable[[Graph], None], PhasePlan]] = {
    "phased_tiny_on_cpu": (tiny_on_cpu, _TWO_AND_TWO),
    "phased_wan22_t2v": (wan22_t2v, _TWO_AND_TWO),
    "phased_wan22_i2v": (wan22_i2v, _TWO_AND_TWO),
    "phased_wan22_first_last_frame": (wan22_first_last_frame, _TWO_AND_TWO),
    "phased_wan22_undistilled_first_step": (wan22_undistilled_first_step, PhasePlan.from_steps([1, 1, 2], shift=5.0)),
    "phased_wan22_boundary": (wan22_boundary, PhasePlan.from_steps([5, 5], shift=8.0)),
    "phased_qwen_image_lightning": (qwen_image_lightning, PhasePlan.preset("qwen-image-lightning-4step")),
    "phased_qwen_image_2512_lightning": (
        qwen_image_2512_lightning,
        PhasePlan.preset("qwen-image-2512-lightning-4step"),
    ),
    "phased_qwen_image_edit_2511_lightning": (
        qwen_image_edit_2511_lightning,
        PhasePlan.preset("qwen-image-edit-2511-lightning-4step"),
    ),
    "phased_z_image_turbo": (z_image_turbo, PhasePlan.preset("z-image-turbo")),
    "phased_ltx2_distilled": (ltx2_distilled, PhasePlan.preset("ltx2-distilled")),
}
"""File name to its graph, and to the plan on its thumbnail."""

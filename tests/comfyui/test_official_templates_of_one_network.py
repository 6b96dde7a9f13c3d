"""ComfyUI's own workflow templates of one network on tiny ones: their sampler against ours, latent against latent.

Steps, shift, guidance, sampler, scheduler and sigmas are read from the templates that ComfyUI's package ships; networks
are tiny and random, prompts, pictures and sounds are noise.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.comfyui.test_presets import nodes as nodes_of
from tests.comfyui.test_presets import said
from tests.helpers.comfyui.native_networks import empty, native_network, prompts
from tests.helpers.comfyui.official_templates import (
    SIZE,
    Encoder,
    off,
    pictures,
    plan_of_sigmas,
    sampled_by_ours,
)
from tests.helpers.comfyui.phased_models import SEED
from tests.helpers.comfyui.tiny_models import Z_IMAGE_TEXT, qwen_state, z_image_state
from tests.helpers.tiny import randn


def values_of(template: str, kind: str) -> list[list[Any]]:
    """The widgets of each node of a type."""
    return [node["widgets_values"] for node in nodes_of(template) if node["type"] == kind]


def by_ksampler(pack: Any, model: Any, shift: float, steps: int, cfg: float, sampler: str, ready: Any) -> Tensor:
    """ModelSamplingSD3 and KSampler with the scheduler `simple`."""
    (shifted,) = pack.call("ModelSamplingSD3", model=model, shift=shift)
    inputs = {"steps": steps, "cfg": cfg, "sampler_name": sampler, "scheduler": "simple", "denoise": 1.0, "seed": SEED}
    inputs |= {"positive": ready[0], "negative": ready[1], "latent_image": ready[2]}
    return pack.call("KSampler", model=shifted, **inputs)[0]["samples"]


def by_custom_sampler(pack: Any, guider: Any, sampler: str, sigmas: Tensor, latent: Any) -> Tensor:
    """RandomNoise, KSamplerSelect and SamplerCustomAdvanced."""
    (noise,) = pack.call("RandomNoise", noise_seed=SEED)
    (choice,) = pack.call("KSamplerSelect", sampler_name=sampler)
    inputs = {"noise": noise, "guider": guider, "sampler": choice, "sigmas": sigmas, "latent_image": latent}
    return pack.call("SamplerCustomAdvanced", **inputs)[0]["samples"]


def sigmas_of_ksampler(model: Any, shift: float, steps: int, sampler: str) -> list[float]:
    """Of `simple` as KSampler has it, which for uni_pc leaves out the last of one step more; without the final 0."""
    import comfy.model_management
    import comfy.samplers
    import nodes

    (shifted,) = nodes.NODE_CLASS_MAPPINGS["ModelSamplingSD3"]().patch(model, shift)
    device = comfy.model_management.get_torch_device()
    return comfy.samplers.KSampler(shifted, steps, device, sampler, "simple").sigmas.tolist()[:-1]


@pytest.mark.parametrize(
    ("preset", "template", "sampling"),
    [
        ("qwen-image-lightning-8step", "image_qwen_image", "ModelSamplingAuraFlow"),
        ("qwen-image-2512-lightning-4step", "image_qwen_Image_2512", "ModelSamplingAuraFlow"),
        ("qwen-image-edit-2511-lightning-4step", "image_qwen_image_edit_2511", "ModelSamplingAuraFlow"),
        ("z-image-turbo", "image_z_image_turbo", "ModelSamplingAuraFlow"),
    ],
)
def test_pictures(pack, models, preset: str, template: str, sampling: str) -> None:
    """At the shift of the template, which the authors of a file may have set otherwise."""
    import comfy.sd

    is_z_image = preset == "z-image-turbo"
    network = comfy.sd.load_diffusion_model_state_dict(z_image_state(0) if is_z_image else qwen_state(0))
    texts = [
        [[randn(1, 8, Z_IMAGE_TEXT, seed=seed), {}]] if is_z_image else models.conditioning("qwen", seed=seed)
        for seed in (7, 8)
    ]
    if "edit" in preset:
        references = {"reference_latents": [randn(1, 16, 1, 8, 8, seed=5)]}
        texts = [[[text[0][0], {**text[0][1], **references}]] for text in texts]
    latent = {"samples": torch.zeros((1, 16, 8, 8) if is_z_image else (1, 16, 1, 8, 8))}
    (shift,) = {round(values[0], 6) for values in values_of(template, sampling)}
    (sampler,) = {values[4] for values in values_of(template, "KSampler")}
    steps = len(pack.module("pdmd_core.phases").PhasePlan.preset(preset).sigmas)
    (shifted,) = pack.call(sampling, model=network, shift=shift)
    common = {"seed": SEED, "steps": steps, "cfg": 1.0, "sampler_name": sampler, "scheduler": "simple", "denoise": 1.0}
    common |= {"positive": texts[0], "negative": texts[1], "latent_image": latent}
    (expected,) = pack.call("KSampler", model=shifted, **common)
    (plan,) = pack.call("PhasedDMDPlanFromSteps", steps=str(steps), shift=shift, names="")
    found = sampled_by_ours(pack, [network], plan, "1", sampler, [*texts, latent])
    assert off(found, expected["samples"]) < 1e-5


def test_wan22_s2v(pack, models) -> None:
    """With sound, and a second piece that continues the first; few steps and many."""
    template = "video_wan2_2_14B_s2v"
    network = native_network("s2v", 0)
    sound = {"encoded_audio_all_layers": [randn(1, 40, 8, seed=n) for n in range(25)]}
    common = {"vae": Encoder(), "audio_encoder_output": sound, "ref_image": pictures(1, 1)}
    texts = dict(zip(("positive", "negative"), (prompts("s2v", seed) for seed in (7, 8)), strict=True))
    first = pack.call("WanSoundImageToVideo", **texts, **common, **{**SIZE, "width": 64, "height": 64})
    ((shift,),) = {tuple(values) for values in values_of(template, "ModelSamplingSD3")}
    ((sampler, scheduler),) = {(values[4], values[5]) for values in values_of(template, "KSampler")}
    assert scheduler == "simple"
    words = said(template)
    for steps, cfg in zip(sorted(words["steps"] & {4, 20}), (1, 6), strict=True):
        assert cfg in words["cfg"]
        plan = plan_of_sigmas(pack, sigmas_of_ksampler(network, shift, steps, sampler))
        expected = by_ksampler(pack, network, shift, steps, cfg, sampler, first)
        found = sampled_by_ours(pack, [network], plan, str(cfg), sampler, first)
        assert off(found, expected) < 1e-5
        more = {"length": SIZE["length"], "video_latent": {"samples": expected}}
        second = pack.call("WanSoundImageToVideoExtend", **texts, **common, **more)
        continued = by_ksampler(pack, network, shift, steps, cfg, sampler, second)
        assert off(sampled_by_ours(pack, [network], plan, str(cfg), sampler, second), continued) < 1e-5
        assert off(continued, expected) > 1e-3


def test_wan22_animate(pack, models) -> None:
    """As the template of comfyui-workflow-templates-media-video 0.3.0 has it; later packages have none."""
    network = native_network("animate", 0)
    pooled = torch.nn.AdaptiveAvgPool2d((16, 32))  # in the place of convolutions over 512 pixels, a minute on a CPU
    network.model.diffusion_model.motion_encoder.get_motion = lambda faces: pooled(faces).mean(1).flatten(1)
    steps, cfg, sampler, shift = 6, 1.0, "euler", 8.0
    clips = {name: pictures(1, seed) for seed, name in enumerate(("pose_video", "face_video", "background_video"))}
    seen = SimpleNamespace(penultimate_hidden_states=randn(1, 4, 1280, seed=4))
    inputs = {"positive": prompts("animate", 7), "negative": prompts("animate", 8), "vae": Encoder(), **clips}
    inputs |= {"clip_vision_output": seen, "reference_image": pictures(1, 5), "character_mask": torch.ones(1, 32, 32)}
    inputs |= {**SIZE, "length": 1, "continue_motion_max_frames": 5, "video_frame_offset": 0}
    ready = pack.call("WanAnimateToVideo", **inputs)
    expected = by_ksampler(pack, network, shift, steps, cfg, sampler, ready)
    # a table of a thousand sigmas has no sixths
    plan = plan_of_sigmas(pack, sigmas_of_ksampler(network, shift, steps, sampler))
    assert off(sampled_by_ours(pack, [network], plan, str(cfg), sampler, ready), expected) < 1e-5


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_hunyuan_video_15(pack, models, task: str) -> None:
    template = f"video_hunyuan_video_1.5_720p_{task}"
    network = native_network("hunyuan15", 0)
    texts = {"positive": prompts("hunyuan15", 7), "negative": prompts("hunyuan15", 8)}
    if task == "t2v":
        ready = [*texts.values(), pack.call("EmptyHunyuanVideo15Latent", **{**SIZE, "width": 64, "height": 64})[0]]
    else:
        seen = SimpleNamespace(last_hidden_state=randn(1, 4, 1152, seed=4))
        inputs = {"vae": Encoder(32, 16), "start_image": pictures(1, 1, 64), "clip_vision_output": seen}
        ready = pack.call("HunyuanVideo15ImageToVideo", **texts, **inputs, **{**SIZE, "width": 64, "height": 64})
    samplers = [node for node in nodes_of(template) if node.get("mode") == 0]  # the other are of its upscaler
    (shift,), (cfg,), (sampler,), (scheduler, steps, _) = (
        next(node["widgets_values"] for node in samplers if node["type"] == kind)
        for kind in ("ModelSamplingSD3", "CFGGuider", "KSamplerSelect", "BasicScheduler")
    )
    (shifted,) = pack.call("ModelSamplingSD3", model=network, shift=shift)
    (sigmas,) = pack.call("BasicScheduler", model=network, scheduler=scheduler, steps=steps, denoise=1.0)
    (guider,) = pack.call("CFGGuider", model=shifted, positive=ready[0], negative=ready[1], cfg=cfg)
    expected = by_custom_sampler(pack, guider, sampler, sigmas, ready[2])
    (plan,) = pack.call("PhasedDMDPlanFromSteps", steps=str(steps), shift=float(shift), names="")
    assert off(sampled_by_ours(pack, [network], plan, str(cfg), sampler, ready), expected) < 1e-5


def test_flux2_klein(pack, models) -> None:
    """The distilled model, by its preset."""
    template = "image_flux2_klein_text_to_image"
    network = native_network("flux2-klein", 0)
    ready = [prompts("flux2-klein", 7), prompts("flux2-klein", 8), empty("flux2-klein", 4, 4)]
    steps, width, height = next(values for values in values_of(template, "Flux2Scheduler") if values[0] == 4)
    (sampler,) = {values[0] for values in values_of(template, "KSamplerSelect")}
    assert [1] in values_of(template, "CFGGuider")
    (sigmas,) = pack.call("Flux2Scheduler", steps=steps, width=width, height=height)
    (guider,) = pack.call("CFGGuider", model=network, positive=ready[0], negative=ready[1], cfg=1.0)
    expected = by_custom_sampler(pack, guider, sampler, sigmas, ready[2])
    (plan,) = pack.call("PhasedDMDPlanFromPreset", preset="flux2-klein-4b")
    assert off(sampled_by_ours(pack, [network], plan, "1", sampler, ready), expected) < 1e-5


def test_flux2_edit(pack, models) -> None:
    """With the guidance that the network was distilled on, and a picture to change; with and without its turbo LoRA."""
    template = "image_flux2"
    network = native_network("flux2", 0)
    ((guidance,),) = values_of(template, "FluxGuidance")
    (text,) = pack.call("FluxGuidance", conditioning=prompts("flux2", 7), guidance=float(guidance))
    picture = {"samples": randn(1, 128, 4, 4, seed=5)}
    (text,) = pack.call("ReferenceLatent", conditioning=text, latent=picture)
    ((_, width, height),) = values_of(template, "Flux2Scheduler")
    ((sampler,),) = values_of(template, "KSamplerSelect")
    steps = sorted(said(template)["steps"])
    assert steps == [8, 20]
    latent = empty("flux2", 4, 4)
    for count in steps:
        (sigmas,) = pack.call("Flux2Scheduler", steps=count, width=width, height=height)
        (guider,) = pack.call("BasicGuider", model=network, conditioning=text)
        expected = by_custom_sampler(pack, guider, sampler, sigmas, latent)
        plan = plan_of_sigmas(pack, sigmas.tolist()[:-1])
        found = sampled_by_ours(pack, [network], plan, "1", sampler, [text, text, latent])
        assert off(found, expected) < 1e-5


class SoundEncoder:
    """What the nodes ask of LTX-2's autoencoder of sound."""

    latent_channels = 8
    first_stage_model = SimpleNamespace(
        latent_frequency_bins=16, num_of_latents_from_frames=lambda frames, rate: round(frames / rate * 25)
    )


def test_ltx2_distilled(pack, models) -> None:
    """Picture and sound in one latent; a stage on all eight sigmas, and one on the last three of a larger picture."""
    template = "video_ltx2_t2v_distilled"
    network = native_network("ltx2", 0)
    texts = [prompts("ltx2", seed) for seed in (7, 8)]
    ready = pack.call("LTXVConditioning", positive=texts[0], negative=texts[1], frame_rate=24.0)
    (picture,) = pack.call("EmptyLTXVLatentVideo", width=64, height=64, length=9, batch_size=1)
    (sound,) = pack.call("LTXVEmptyLatentAudio", frames_number=9, frame_rate=24, batch_size=1, audio_vae=SoundEncoder())
    (latent,) = pack.call("LTXVConcatAVLatent", video_latent=picture, audio_latent=sound)
    (sampler,) = {values[0] for values in values_of(template, "KSamplerSelect")}
    (cfg,) = {values[0] for values in values_of(template, "CFGGuider")}
    (plan,) = pack.call("PhasedDMDPlanFromPreset", preset="ltx2-distilled")
    (guider,) = pack.call("CFGGuider", model=network, positive=ready[0], negative=ready[1], cfg=float(cfg))
    stages = sorted((values[0] for values in values_of(template, "ManualSigmas")), key=len, reverse=True)
    assert len(stages) == 2
    for text, denoise in zip(stages, (1.0, 0.91), strict=True):
        (sigmas,) = pack.call("ManualSigmas", sigmas=text)
        expected = by_custom_sampler(pack, guider, sampler, sigmas, latent).unbind()
        found = sampled_by_ours(pack, [network], plan, str(cfg), sampler, [*ready, latent], denoise).unbind()
        assert [off(*each) < 1e-5 for each in zip(found, expected, strict=True)] == [True, True]
        larger = torch.nn.functional.interpolate(expected[0], scale_factor=(1, 2, 2))
        (latent,) = pack.call(
            "LTXVConcatAVLatent", video_latent={"samples": larger}, audio_latent={"samples": expected[1]}
        )


def test_two_experts_share_a_latent_of_picture_and_sound(pack, models) -> None:
    """LTX-2 with two networks, against two samplers by hand."""
    experts = [native_network("ltx2", seed) for seed in (0, 1)]
    texts = [prompts("ltx2", seed) for seed in (7, 8)]
    latent = {"samples": empty("ltx2", 2, 2, 2)["samples"]}
    (latent,) = pack.call("LTXVConcatAVLatent", video_latent=latent, audio_latent={"samples": torch.zeros(1, 8, 4, 16)})
    phases = [[1.0, 0.9], [0.7, 0.4]]
    halves = []
    for k, sigmas in enumerate(([1.0, 0.9, 0.7], [0.7, 0.4, 0.0])):
        (guider,) = pack.call("CFGGuider", model=experts[k], positive=texts[0], negative=texts[1], cfg=1.0)
        (choice,) = pack.call("KSamplerSelect", sampler_name="euler")
        (noise,) = pack.call("DisableNoise") if k else pack.call("RandomNoise", noise_seed=SEED)
        inputs = {"noise": noise, "guider": guider, "sampler": choice, "sigmas": torch.tensor(sigmas)}
        half = halves[0] if k else latent
        halves += [pack.call("SamplerCustomAdvanced", latent_image=half, **inputs)[0]]
    found = sampled_by_ours(pack, experts, plan_of_sigmas(pack, *phases), "1", "euler", [*texts, latent]).unbind()
    expected = halves[1]["samples"].unbind()
    assert [off(*each) < 1e-5 for each in zip(found, expected, strict=True)] == [True, True]
    alone = sampled_by_ours(pack, experts[:1] * 2, plan_of_sigmas(pack, *phases), "1", "euler", [*texts, latent])
    assert off(alone.unbind()[0], found[0]) > 1e-3

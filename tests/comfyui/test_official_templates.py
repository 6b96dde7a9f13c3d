"""ComfyUI's own workflow templates on tiny networks: their nodes against ours, latent against latent.

Steps, split, shift, guidance, sampler and scheduler are read from the templates that ComfyUI's package ships; networks
are tiny and random, prompts and pictures are noise.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.comfyui.test_presets import nodes as nodes_of
from tests.helpers.comfyui.phased_models import SEED
from tests.helpers.comfyui.tiny_models import WAN_WIDTH, Z_IMAGE_TEXT, qwen_state, z_image_state
from tests.helpers.tiny import TEXT_FEATURES, randn

SIZE = {"width": 32, "height": 32, "length": 5, "batch_size": 1}


class Encoder:
    """What the nodes ask of an autoencoder: a latent of the right size that depends on the pixels."""

    latent_channels = 16

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: Tensor) -> Tensor:
        frames, height, width = (pixels.shape[0] - 1) // 4 + 1, pixels.shape[1] // 8, pixels.shape[2] // 8
        return randn(1, 16, frames, height, width, seed=int(1000 * float(pixels.mean())))


def pictures(count: int, seed: int) -> Tensor:
    return torch.rand(count, 32, 32, 3, generator=torch.manual_seed(seed))


@dataclass(frozen=True)
class Template:
    """A template: its networks, and its node that makes conditioning and latent."""

    name: str
    channels: int = 16
    conditioning: str | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    vace: bool = False


TWO_NETWORKS = [
    Template("video_wan2_2_14B_t2v"),
    Template("video_wan2_2_14B_i2v", 36, "WanImageToVideo", {"start_image": pictures(1, 1)}),
    Template(
        "video_wan2_2_14B_flf2v",
        36,
        "WanFirstLastFrameToVideo",
        {"start_image": pictures(1, 1), "end_image": pictures(1, 2)},
    ),
    Template(
        "video_wan2_2_14B_fun_control",
        52,
        "Wan22FunControlToVideo",
        {"control_video": pictures(5, 3), "start_image": pictures(1, 1)},
    ),
    Template(
        "video_wan2_2_14B_fun_inpaint",
        36,
        "WanFunInpaintToVideo",
        {"start_image": pictures(1, 1), "end_image": pictures(1, 2)},
    ),
    Template(
        "video_wan2_2_14B_t2v",
        16,
        "WanVaceToVideo",
        {"strength": 1.0, "control_video": pictures(5, 3)},
        vace=True,
    ),
]


def pairs(name: str) -> list[dict[str, Any]]:
    """The pairs of KSamplerAdvanced of a template, noisy one first, by the names of their widgets."""
    words = (
        "add_noise",
        "noise_seed",
        "_",
        "steps",
        "cfg",
        "sampler_name",
        "scheduler",
        "start_at_step",
        "end_at_step",
    )
    samplers = [
        dict(zip(words, node["widgets_values"], strict=False))
        for node in nodes_of(name)
        if node["type"] == "KSamplerAdvanced"
    ]
    first = [each for each in samplers if each["add_noise"] == "enable"]
    return [{key: value for key, value in each.items() if key not in ("_", "noise_seed")} for each in first]


def shifts(name: str) -> set[float]:
    return {round(node["widgets_values"][0], 6) for node in nodes_of(name) if node["type"] == "ModelSamplingSD3"}


def vace_network(seed: int) -> Any:
    """Of ComfyUI's own class, since diffusers' layout is another one."""
    import comfy.ldm.wan.model
    import comfy.ops
    import comfy.sd

    sizes = {
        "dim": WAN_WIDTH,
        "ffn_dim": 32,
        "freq_dim": 32,
        "text_dim": TEXT_FEATURES,
        "num_heads": 2,
        "num_layers": 2,
    }
    sizes |= {"vace_layers": 1, "vace_in_dim": 96}
    network = comfy.ldm.wan.model.VaceWanModel(**sizes, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    state = {
        name: randn(*value.shape, seed=1000 * seed + n) / (math.sqrt(value[0].numel()) if value.ndim > 1 else 1)
        for n, (name, value) in enumerate(network.state_dict().items())
    }
    metadata = {"config": json.dumps({"transformer": sizes})}
    return comfy.sd.load_diffusion_model_state_dict(state, metadata=metadata)


def sampled_by_ours(pack: Any, experts: list[Any], plan: Any, cfg: str, sampler: str, ready: Any) -> Tensor:
    common = {"plan": plan, "cfg": cfg, "set_shift": True}
    models = {f"model_{k + 1}": each for k, each in enumerate(experts)}
    (model,) = pack.call("PhasedDMDExperts", **common, **models)
    inputs = {"seed": SEED, "steps": 0, "cfg": 7.0, "sampler_name": sampler, "denoise": 1.0}
    inputs |= {"positive": ready[0], "negative": ready[1], "latent_image": ready[2]}
    return pack.call("PhasedDMDSampler", model=model, **inputs)[0]["samples"]


@pytest.mark.parametrize("template", TWO_NETWORKS, ids=lambda each: f"{each.name} {each.conditioning or ''}".strip())
def test_two_networks_are_sampled_as_by_the_template_s_two_samplers(pack, models, template: Template) -> None:
    load = vace_network if template.vace else (lambda seed: models.wan(seed, in_channels=template.channels))
    experts = [load(seed) for seed in (0, 1)]
    prompts = [models.conditioning("wan", seed=seed) for seed in (7, 8)]
    if template.conditioning is None:
        ready = [*prompts, pack.call("EmptyHunyuanLatentVideo", **SIZE)[0]]
    else:
        inputs = {"positive": prompts[0], "negative": prompts[1], "vae": Encoder(), **SIZE, **template.inputs}
        ready = pack.call(template.conditioning, **inputs)
    found = [(pair, shift) for pair in pairs(template.name) for shift in shifts(template.name)]
    assert found
    for pair, shift in found:
        split, steps = pair["end_at_step"], pair["steps"]
        shifted = [pack.call("ModelSamplingSD3", model=each, shift=shift)[0] for each in experts]
        common = {key: pair[key] for key in ("steps", "cfg", "sampler_name", "scheduler")}
        common |= {"positive": ready[0], "negative": ready[1], "noise_seed": SEED}
        first = {
            "add_noise": "enable",
            "start_at_step": 0,
            "end_at_step": split,
            "return_with_leftover_noise": "enable",
        }
        rest = {"start_at_step": split, "end_at_step": 10000, "return_with_leftover_noise": "disable"}
        (half,) = pack.call("KSamplerAdvanced", model=shifted[0], latent_image=ready[2], **common, **first)
        rest |= {"add_noise": "disable", "latent_image": half}
        (expected,) = pack.call("KSamplerAdvanced", model=shifted[1], **common, **rest)
        assert pair["scheduler"] == "simple"
        plan = {"steps": f"{split}, {steps - split}", "shift": shift, "names": ""}
        (plan,) = pack.call("PhasedDMDPlanFromSteps", **plan)
        ours = sampled_by_ours(pack, experts, plan, str(pair["cfg"]), pair["sampler_name"], ready)
        scale = expected["samples"].abs().max()
        # the hand-over of two samplers goes through the latent's own scale and back, which rounds
        assert (ours - expected["samples"]).abs().max() / scale < 1e-5, (pair, shift)
        alone = sampled_by_ours(pack, [experts[0]] * 2, plan, str(pair["cfg"]), pair["sampler_name"], ready)
        assert (ours - alone).abs().max() / scale > 1e-3


@pytest.mark.parametrize(
    ("preset", "template", "sampling"),
    [
        ("qwen-image-lightning-8step", "image_qwen_image", "ModelSamplingAuraFlow"),
        ("qwen-image-2512-lightning-4step", "image_qwen_Image_2512", "ModelSamplingAuraFlow"),
        ("qwen-image-edit-2511-lightning-4step", "image_qwen_image_edit_2511", "ModelSamplingAuraFlow"),
        ("z-image-turbo", "image_z_image_turbo", "ModelSamplingAuraFlow"),
    ],
)
def test_one_network_is_sampled_as_by_the_template_s_ksampler(
    pack, models, preset: str, template: str, sampling: str
) -> None:
    """At the shift of the template, which the authors of a file may have set otherwise."""
    import comfy.sd

    is_z_image = preset == "z-image-turbo"
    network = comfy.sd.load_diffusion_model_state_dict(z_image_state(0) if is_z_image else qwen_state(0))
    prompts = [
        [[randn(1, 8, Z_IMAGE_TEXT, seed=seed), {}]] if is_z_image else models.conditioning("qwen", seed=seed)
        for seed in (7, 8)
    ]
    if "edit" in preset:
        references = {"reference_latents": [randn(1, 16, 1, 8, 8, seed=5)]}
        prompts = [[[prompt[0][0], {**prompt[0][1], **references}]] for prompt in prompts]
    latent = {"samples": torch.zeros((1, 16, 8, 8) if is_z_image else (1, 16, 1, 8, 8))}
    (shift,) = {round(n["widgets_values"][0], 6) for n in nodes_of(template) if n["type"] == sampling}
    (sampler,) = {n["widgets_values"][4] for n in nodes_of(template) if n["type"] == "KSampler"}
    plan = pack.module("pdmd_core.phases").PhasePlan.preset(preset)
    steps = len(plan.sigmas)
    (shifted,) = pack.call(sampling, model=network, shift=shift)
    common = {"seed": SEED, "steps": steps, "cfg": 1.0, "sampler_name": sampler, "scheduler": "simple", "denoise": 1.0}
    common |= {"positive": prompts[0], "negative": prompts[1], "latent_image": latent}
    (expected,) = pack.call("KSampler", model=shifted, **common)
    (plan,) = pack.call("PhasedDMDPlanFromSteps", steps=str(steps), shift=shift, names="")
    found = sampled_by_ours(pack, [network], plan, "1", sampler, [*prompts, latent])
    scale = expected["samples"].abs().max()
    assert (found - expected["samples"]).abs().max() / scale < 1e-5

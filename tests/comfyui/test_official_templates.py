"""ComfyUI's own workflow templates of two networks on tiny ones: their nodes against ours, latent against latent.

Steps, split, shift, guidance, sampler and scheduler are read from the templates that ComfyUI's package ships; networks
are tiny and random, prompts and pictures are noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.comfyui.test_presets import nodes as nodes_of
from tests.helpers.comfyui.native_networks import native_network
from tests.helpers.comfyui.official_templates import SIZE, Encoder, off, pictures, sampled_by_ours
from tests.helpers.comfyui.phased_models import SEED


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


@pytest.mark.parametrize("template", TWO_NETWORKS, ids=lambda each: f"{each.name} {each.conditioning or ''}".strip())
def test_two_networks_are_sampled_as_by_the_template_s_two_samplers(pack, models, template: Template) -> None:
    experts = [
        native_network("vace", seed) if template.vace else models.wan(seed, in_channels=template.channels)
        for seed in (0, 1)
    ]
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
        # the hand-over of two samplers goes through the latent's own scale and back, which rounds
        assert off(ours, expected["samples"]) < 1e-5, (pair, shift)
        alone = sampled_by_ours(pack, [experts[0]] * 2, plan, str(pair["cfg"]), pair["sampler_name"], ready)
        assert off(ours, alone) > 1e-3

"""Z-Image, whose projections ComfyUI joins: LoRA experts under diffusers' names land on their parts of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pdmd_core.experts import BaseModel, Expert, Manifest, lora_to_file, write_experts
from pdmd_core.experts.convert.native import in_native_layout
from pdmd_core.experts.format.weights import weights_of
from pdmd_core.families import family
from pdmd_core.phases import PhasePlan
from tests.helpers.comfyui.phased_models import LOAD, noise_of, sigmas_of
from tests.helpers.comfyui.tiny_models import Z_IMAGE_TEXT, Z_IMAGE_WIDTH, z_image_state
from tests.helpers.families.parts import spread
from tests.helpers.tiny import randn

PLAN = PhasePlan.from_steps([2, 2], shift=3.0)
NAMES = [phase.name for phase in PLAN.phases]
ORIGIN = BaseModel("tiny/z", "ZImageTransformer2DModel", "z_image")
RANK, ALPHA = 2, 3.0
LAYERS = ("layers.0", "noise_refiner.1", "context_refiner.0")
TARGETS = {f"attention.to_{part}": (Z_IMAGE_WIDTH, Z_IMAGE_WIDTH) for part in ("q", "k", "v", "out.0")}
TARGETS |= {"feed_forward.w1": (768, Z_IMAGE_WIDTH), "feed_forward.w2": (Z_IMAGE_WIDTH, 768)}


def adapters(seed: int) -> dict[str, Tensor]:
    """As the trainer has them: ``<module>.lora_A`` and ``.lora_B``."""
    state = {}
    for n, (layer, (target, (out, into))) in enumerate((a, b) for a in LAYERS for b in TARGETS.items()):
        state[f"{layer}.{target}.lora_A"] = randn(RANK, into, seed=seed * 100 + n) / 10
        state[f"{layer}.{target}.lora_B"] = randn(out, RANK, seed=seed * 100 + n + 50)
    return state


def merged(base: dict[str, Tensor], lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights plus alpha / rank * B A; q, k and v are the thirds of one weight."""
    state = {name: value.clone() for name, value in base.items()}
    for key in lora:
        module, _, part = key.rpartition(".")
        if part != "lora_A":
            continue
        delta = ALPHA / RANK * lora[f"{module}.lora_B"] @ lora[key]
        layer, _, target = module.partition(".attention.")
        if target in ("to_q", "to_k", "to_v"):
            third = ("to_q", "to_k", "to_v").index(target) * Z_IMAGE_WIDTH
            state[f"{layer}.attention.qkv.weight"][third : third + Z_IMAGE_WIDTH] += delta
        else:
            state[f"{module.replace('to_out.0', 'out')}.weight"] += delta
    return state


def diffusers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same network as diffusers stores it."""
    apart: dict[str, Tensor] = {}
    places = {"attention.q_norm.": "attention.norm_q.", "attention.k_norm.": "attention.norm_k."}
    places |= {"attention.out.": "attention.to_out.0.", "x_embedder.": "all_x_embedder.2-1."}
    places |= {"final_layer.": "all_final_layer.2-1."}
    for name, value in state.items():
        if name.endswith(".qkv.weight"):
            for part, third in zip("qkv", value.chunk(3), strict=True):
                apart[name.replace(".qkv.", f".to_{part}.")] = third.contiguous()
            continue
        for ours, theirs in places.items():
            name = name.replace(ours, theirs)
        apart[name] = value
    return apart


def sampled(pack: Any, model: Any) -> Tensor:
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    prompts = [[[randn(1, 8, Z_IMAGE_TEXT, seed=seed), {}]] for seed in (7, 8)]
    (guider,) = pack.call("CFGGuider", model=model, positive=prompts[0], negative=prompts[1], cfg=1.0)
    import comfy.samplers

    return guider.sample(noise_of(latent), latent["samples"], comfy.samplers.sampler_object("euler"), sigmas_of(PLAN))


@pytest.fixture(scope="module")
def bases(models):
    import comfy.sd

    def load(state: dict[str, Tensor]) -> Any:
        return comfy.sd.load_diffusion_model_state_dict(dict(state))

    return load


def lora_manifest() -> Manifest:
    entries = tuple(
        Expert(name, f"{name}.safetensors", "lora", "", "transformer", RANK, ALPHA, tuple(TARGETS)) for name in NAMES
    )
    return Manifest(ORIGIN, PLAN, entries, 1.0)


def test_lora_experts_are_the_networks_with_their_weights_merged(pack, bases, base: Path) -> None:
    folder, state = base / "models/phased_experts/z_lora", z_image_state(0)
    loras = {name: adapters(k + 1) for k, name in enumerate(NAMES)}
    names = family("z_image")
    write_experts(folder, lora_manifest(), {name: lora_to_file(loras[name], ALPHA, names) for name in NAMES})
    model, plan = pack.call("PhasedDMDLoadExperts", experts="z_lora", base_1=bases(state), **LOAD)
    composite = pack.module("comfy_nodes.composite")
    by_hand = [composite.Expert(bases(merged(state, loras[name])), 1.0) for name in NAMES]
    found, expected = sampled(pack, model), sampled(pack, composite.compose(plan, by_hand))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    plain = composite.compose(plan, [composite.Expert(bases(state), 1.0)] * 2)
    assert (found - sampled(pack, plain)).abs().max() > 0.05


def test_a_lora_of_another_width_is_refused_on_a_part_of_a_weight(pack, bases, base: Path) -> None:
    folder = base / "models/phased_experts/z_wide"
    wide = {key: torch.cat([value, value], -1) if key.endswith("A") else value for key, value in adapters(1).items()}
    only_q = {key: value for key, value in wide.items() if ".to_q." in key}
    file = lora_to_file(only_q, ALPHA, family("z_image"))
    write_experts(folder, lora_manifest(), dict.fromkeys(NAMES, file))
    with pytest.raises(
        pack.module("comfy_nodes.errors").NodeError, match=r"qkv\.weight is 288x288 .+ and 288x576 in the L"
    ):
        pack.call("PhasedDMDLoadExperts", experts="z_wide", base_1=bases(z_image_state(0)), **LOAD)


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_full_experts_load_in_both_layouts(pack, bases, base: Path, layout: str) -> None:
    folder, states = (
        base / f"models/phased_experts/z_{layout}",
        {name: z_image_state(k) for k, name in enumerate(NAMES)},
    )
    entries = tuple(Expert(name, f"{name}.safetensors", "full", "") for name in NAMES)
    stored = states if layout == "native" else {name: diffusers_names(state) for name, state in states.items()}
    write_experts(folder, Manifest(ORIGIN, PLAN, entries), stored)
    load = {**LOAD, "experts": f"z_{layout}"}
    model, plan = pack.call("PhasedDMDLoadExperts", **load)
    composite = pack.module("comfy_nodes.composite")
    by_hand = composite.compose(plan, [composite.Expert(bases(state)) for state in states.values()])
    assert torch.equal(sampled(pack, model), sampled(pack, by_hand))
    extra = {name: {**state, "layers.0.attention.to_x.weight": torch.ones(1)} for name, state in stored.items()}
    write_experts(folder, Manifest(ORIGIN, PLAN, entries), extra)
    with pytest.raises(
        pack.module("comfy_nodes.errors").NodeError, match="weights are missing or unknown, for example"
    ):
        pack.call("PhasedDMDLoadExperts", **load)


@torch.no_grad()
def test_full_experts_have_the_velocity_that_they_have_in_diffusers(models) -> None:
    import comfy.model_management
    import comfy.sd
    from diffusers import ZImageTransformer2DModel

    found = family("z_image")
    sizes = {"dim": Z_IMAGE_WIDTH, "n_layers": 1, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": Z_IMAGE_TEXT}
    axes = {"axes_dims": [32, 32, 32], "axes_lens": [64, 32, 32]}
    network = ZImageTransformer2DModel(in_channels=16, **sizes, **axes).eval()
    network.t_embedder = type(network.t_embedder)(256, mid_size=Z_IMAGE_WIDTH)  # 1024 in both, where they are as wide
    spread(network, 0.02)
    native = in_native_layout(weights_of(network.state_dict()), found)
    state = {name: native.read(name).clone() for name in native.specs}
    model = comfy.sd.load_diffusion_model_state_dict(state)
    comfy.model_management.load_models_gpu([model])
    x, prompts = randn(1, 16, 8, 12), randn(1, 5, Z_IMAGE_TEXT, seed=1)
    conditioning = {"prompt_embeds": prompts, "prompt_mask": torch.ones(1, 5)}
    velocities = [found.velocity(network, x, sigma, conditioning) for sigma in (0.9, 0.3)]
    for sigma, expected in zip((0.9, 0.3), velocities, strict=True):
        x_0 = model.model.apply_model(x, torch.tensor([sigma]), c_crossattn=prompts, num_tokens=5)
        torch.testing.assert_close(x_0, x - sigma * expected, rtol=1e-5, atol=1e-5)
    assert (velocities[0] - velocities[1]).abs().max() > 0.01


def test_weights_that_comfyuis_conversion_does_not_know_are_not_forgotten(pack) -> None:
    flux = {"x_embedder.weight": torch.ones(4, 2), "x_embedder.bias": torch.ones(4), "unknown.weight": torch.ones(1)}
    names = pack.module("comfy_nodes.loading")._names_in_comfyui(flux)
    assert names == {"img_in.weight", "img_in.bias", "unknown.weight"}

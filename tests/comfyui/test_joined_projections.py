"""Networks of which ComfyUI joins layers that are several in diffusers: LoRA experts and full ones count as there.

The networks are ComfyUI's own classes in tiny sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from torch import Tensor

from pdmd_core.experts import BaseModel, Expert, Manifest, lora_to_file, write_experts
from pdmd_core.experts.convert.native import in_native_layout
from pdmd_core.experts.format.fingerprint import fingerprint_of
from pdmd_core.experts.format.weights import weights_of
from pdmd_core.experts.lora.alpha import Alphas
from pdmd_core.experts.lora.file import read_lora
from pdmd_core.experts.lora.layouts import in_layout
from pdmd_core.families import family
from pdmd_core.phases import PhasePlan
from tests.helpers.comfyui.phased_models import LOAD, with_lora
from tests.helpers.families.chroma import chroma
from tests.helpers.families.flux import flux
from tests.helpers.families.flux2 import flux2
from tests.helpers.families.hunyuan_video_15 import hunyuan_video_15
from tests.helpers.families.ltx2 import ltx2
from tests.helpers.families.parts import spread
from tests.helpers.families.stable_diffusion_3 import stable_diffusion_3
from tests.helpers.tiny import randn
from tests.helpers.tiny_pipelines import random_lora

RANK, ALPHA = 4, 6.0
FLUX = {
    "in_channels": 4,
    "out_channels": 4,
    "context_in_dim": 32,
    "hidden_size": 32,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [4, 4, 8],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "txt_ids_dims": [],
}
FLUX2 = FLUX | {
    "txt_ids_dims": [3],
    "in_channels": 16,
    "out_channels": 16,
    "context_in_dim": 48,
    "mlp_ratio": 3.0,
    "axes_dim": [4, 4, 4, 4],
    "theta": 2000,
    "patch_size": 1,
    "qkv_bias": False,
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "vec_in_dim": None,
    "guidance_embed": True,
}
SD3 = {
    "in_channels": 4,
    "depth": 2,
    "num_blocks": 2,
    "patch_size": 2,
    "pos_embed_scaling_factor": None,
    "input_size": None,
    "adm_in_channels": 64,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}},
    "num_patches": 9216,
    "pos_embed_max_size": 96,
    "qk_norm": "rms",
    "x_block_self_attn_layers": [0],
}
LTX2 = {
    "image_model": "ltxav",
    "in_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "audio_in_channels": 16,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 1,
    "caption_channels": 16,
    "connector_num_attention_heads": 1,
    "connector_attention_head_dim": 8,
}
HUNYUAN = {
    "image_model": "hunyuan_video",
    "in_channels": 9,
    "out_channels": 4,
    "patch_size": [1, 1, 1],
    "vec_in_dim": None,
    "hidden_size": 16,
    "context_in_dim": 16,
    "mlp_ratio": 2.0,
    "num_heads": 1,
    "depth": 1,
    "depth_single_blocks": 0,
    "axes_dim": [4, 6, 6],
    "theta": 256,
    "qkv_bias": True,
    "guidance_embed": False,
    "meanflow": False,
    "byt5": True,
    "use_cond_type_embedding": True,
    "vision_in_dim": 8,
    "meanflow_sum": True,
}
CASES: dict[str, tuple[Callable[[], Any], str, dict[str, Any]]] = {
    "hunyuan_video_15": (hunyuan_video_15, "HunyuanVideo15", HUNYUAN),
    "flux": (flux, "Flux", FLUX | {"image_model": "flux", "vec_in_dim": 32, "guidance_embed": True}),
    "flux2": (flux2, "Flux2", FLUX2 | {"image_model": "flux2"}),
    "chroma": (
        chroma,
        "Chroma",
        FLUX
        | {"image_model": "chroma", "in_channels": 16, "out_channels": 16, "vec_in_dim": None}
        | {"in_dim": 64, "out_dim": 32, "hidden_dim": 16, "n_layers": 1},
    ),
    "ltx2": (ltx2, "LTXAV", LTX2),
    "stable_diffusion_3": (
        lambda: stable_diffusion_3(attention_head_dim=64, num_attention_heads=2, caption_projection_dim=128),
        "SD3",
        SD3,
    ),
}
"""Family to its pipeline in diffusers, and ComfyUI's class with the settings of the same network."""


CONSTANTS = {
    "chroma": {"approximator_num_channels": 64},
    "flux2": {"timestep_guidance_channels": 256},
    "hunyuan_video_15": {"num_refiner_layers": 2, "text_embed_2_dim": 1472},
}
"""What ComfyUI's classes take for granted, in the configurations of diffusers."""


def of_comfyui(name: str) -> Any:
    """The network as a MODEL, with random weights."""
    import comfy.model_patcher
    import comfy.supported_models

    _, kind, settings = CASES[name]
    cpu = torch.device("cpu")
    config = getattr(comfy.supported_models, kind)(settings)
    config.set_inference_dtype(torch.float32, None)
    torch.manual_seed(0)
    model = comfy.model_patcher.ModelPatcher(config.get_model({}), load_device=cpu, offload_device=cpu)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
        for buffer in model.model.buffers():  # some are made with torch.empty
            buffer.zero_()
    return model


@pytest.mark.parametrize("name", CASES)
def test_lora_experts_change_what_they_change_in_diffusers(pack, name: str) -> None:
    import comfy.sd

    build, found = CASES[name][0], family(name)
    model = of_comfyui(name)
    lora = random_lora(build().transformer, RANK, 1, found.lora_targets)
    file = lora_to_file(lora, ALPHA, found)
    native = in_layout(read_lora(file, Alphas(), found.lora_names, "file"), found.lora_names, "native")
    assert not native.left_out
    by_comfyui, _ = comfy.sd.load_lora_for_models(model, None, native.tensors, 1.0, 0.0)
    before = {key: value.clone() for key, value in model.model.diffusion_model.state_dict().items()}
    for patched in (with_lora(pack, model, file), by_comfyui):
        patched.patch_model(device_to=torch.device("cpu"))
        after = {key: value.clone() for key, value in patched.model.diffusion_model.state_dict().items()}
        patched.unpatch_model()
        changed = set()
        for key, value in before.items():
            place = found.lora_names.place(key.removesuffix(".weight")) if key.endswith(".weight") else None
            modules = place.names if place else ()
            deltas = [_delta(lora, module) for module in modules]
            if not deltas or deltas[0] is None:
                assert torch.equal(after[key], value), key
                continue
            changed |= set(modules)
            torch.testing.assert_close(after[key], value + torch.cat(deltas), rtol=1e-5, atol=1e-5, msg=key)
        assert changed == {key.rpartition(".")[0] for key in lora}, "each layer that was trained, and no other"
    beside = with_lora(pack, model, file, beside=True)
    assert not beside.patches
    beside.patch_model(device_to=torch.device("cpu"))
    for key, layer in model.model.diffusion_model.named_modules():
        place = found.lora_names.place(key) if isinstance(layer, torch.nn.Linear) else None
        deltas = [_delta(lora, module) for module in place.names] if place else [None]
        if deltas[0] is not None:
            x = randn(3, layer.in_features)
            expected = torch.nn.functional.linear(x, before[f"{key}.weight"] + torch.cat(deltas), layer.bias)
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    beside.unpatch_model()


def inputs(name: str, network: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """A sample and prompts for a network."""
    channels, frames = network.config.in_channels, ()
    if name in ("flux", "chroma"):
        channels //= 4
    if name == "hunyuan_video_15":
        channels, frames = network.config.out_channels, (2,)
    x = randn(1, channels, *frames, 4, 6)
    shapes = family(name).conditioning_shapes(network.config, 5, x.shape[1:])
    masks = {key: torch.ones(1, *shape, dtype=torch.long) for key, shape in shapes.items() if "mask" in key}
    return x, {key: randn(1, *shape, seed=n) for n, (key, shape) in enumerate(shapes.items())} | masks


@pytest.mark.parametrize("name", [name for name in CASES if family(name).native_layout])
@torch.no_grad()
def test_full_experts_have_the_velocity_that_they_have_in_diffusers(pack, name: str) -> None:
    found, model = family(name), of_comfyui(name)
    tiny = CASES[name][0]().transformer
    network = type(tiny).from_config({**tiny.config, **CONSTANTS.get(name, {})}).eval()
    spread(network, 0.1)
    native = in_native_layout(weights_of(network.state_dict()), found)
    model.model.load_model_weights({key: native.read(key) for key in native.specs}, "")
    if name == "chroma":  # ComfyUI makes the modulation of 19 and 38 blocks
        network.time_text_embed = type(network.time_text_embed)(num_channels=16, out_dim=344)
    x, conditioning = inputs(name, network)
    context = {"c_crossattn": conditioning["prompt_embeds"], "transformer_options": {}}
    context["guidance"] = torch.tensor([0.0 if name == "chroma" else found.embedded_guidance])
    if name == "hunyuan_video_15":
        context |= {"txt_byt5": conditioning["glyph_embeds"], "c_concat": x.new_zeros(1, 5, *x.shape[2:])}
    if "pooled_prompt_embeds" in conditioning:
        context["y"] = conditioning["pooled_prompt_embeds"]
    velocities = []
    for sigma in (0.9, 0.3):
        velocities.append(found.velocity(network, x, sigma, conditioning))
        x_0 = model.model.apply_model(x, torch.tensor([sigma]), **context)
        torch.testing.assert_close((x - x_0) / sigma, velocities[-1], rtol=1e-5, atol=1e-5)
    assert (velocities[0] - velocities[1]).abs().max() > 0.01


def _delta(lora: dict[str, Tensor], module: str) -> Tensor | None:
    """What a layer of diffusers changes by."""
    if f"{module}.lora_A" not in lora:
        return None
    return ALPHA / RANK * lora[f"{module}.lora_B"] @ lora[f"{module}.lora_A"]


@torch.no_grad()
def test_experts_of_hunyuan_video_load_and_count(pack, base: Path) -> None:
    """Full ones, and LoRA experts, of which ComfyUI's own loader reads nothing, in a width that it detects."""
    import comfy.sd

    found, names = family("hunyuan_video_15"), ["high_noise", "low_noise"]
    sizes = {"attention_head_dim": 128, "rope_axes_dim": (16, 56, 56), "mlp_ratio": 4.0, "in_channels": 65}
    config = {**hunyuan_video_15().transformer.config, **sizes}
    config |= CONSTANTS["hunyuan_video_15"] | {"out_channels": 32}
    networks = [HunyuanVideo15Transformer3DModel.from_config(config).eval() for _ in names]
    x, conditioning = inputs(found.name, networks[0])

    def same(experts: str, bases: dict[str, Any], expected: list[Any]) -> list[str]:
        model, _ = pack.call("PhasedDMDLoadExperts", experts=experts, **bases, **LOAD)
        composite = pack.module("comfy_nodes.composite").composite_of(model)
        for expert, network in zip(composite.experts, expected, strict=True):
            close(expert.model, network, x, conditioning)
        return list(composite.warnings)

    folder, plan = base / "models/phased_experts", PhasePlan.from_steps([1, 1], shift=5.0)
    origin = BaseModel(
        "tiny/hy", found.architecture, found.name, fingerprints={"transformer": fingerprint_of(networks[0])}
    )
    full = tuple(Expert(name, f"{name}.safetensors", "full", "") for name in names)
    states = [dict(network.state_dict()) for network in networks]
    write_experts(folder / "hy_full", Manifest(origin, plan, full), dict(zip(names, states, strict=True)))
    same("hy_full", {}, networks)

    lora = random_lora(networks[0], RANK, 1, found.lora_targets)
    kind = {
        "kind": "lora",
        "component": "transformer",
        "rank": RANK,
        "alpha": float(RANK),
        "targets": found.lora_targets,
    }
    entries = [replace(each, **kind) for each in full]
    files = dict.fromkeys(names, lora_to_file(lora, ALPHA, found))
    write_experts(folder / "hy_lora", Manifest(origin, plan, tuple(entries), 1.0), files)
    native = [in_native_layout(weights_of(state), found) for state in states]
    bases = [
        comfy.sd.load_diffusion_model_state_dict({key: weights.read(key).clone() for key in weights.specs})
        for weights in native
    ]
    for network in networks:
        for module in {key.rpartition(".")[0] for key in lora}:
            network.get_parameter(f"{module}.weight").add_(_delta(lora, module))
    assert not same("hy_lora", {"base_1": bases[0]}, [networks[0]] * 2)
    (warning,) = same("hy_lora", {"base_1": bases[1]}, [networks[1]] * 2)
    assert "other weights" in warning


def close(model: Any, network: Any, x: Tensor, conditioning: dict[str, Tensor]) -> None:
    """A MODEL of HunyuanVideo 1.5 has the velocity of diffusers' network."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    expected = family("hunyuan_video_15").velocity(network, x, 0.7, conditioning)
    context = {"c_crossattn": conditioning["prompt_embeds"], "txt_byt5": conditioning["glyph_embeds"]}
    concat = x.new_zeros(1, network.config.in_channels - x.shape[1], *x.shape[2:])
    x_0 = model.model.apply_model(x, torch.tensor([0.7]), c_concat=concat, transformer_options={}, **context)
    torch.testing.assert_close((x - x_0) / 0.7, expected, rtol=1e-5, atol=1e-5)

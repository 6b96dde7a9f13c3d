"""LoRA files of other projects on real MODELs: weights become those of the explicit changes that a file means."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pdmd_core.families import family
from pdmd_core.phases import PhasePlan
from tests.comfyui.test_z_image import diffusers_names
from tests.helpers.comfyui.phased_models import TWO, plan_of, sample, sigmas_of
from tests.helpers.comfyui.tiny_models import qwen_state, wan_file, z_image_state
from tests.helpers.lora_layouts import (
    LAYOUTS,
    RANK,
    Deltas,
    Pairs,
    added,
    deltas_of,
    pairs_of,
    save,
    wan_of_2026,
    with_alpha,
)
from tests.helpers.tiny import lora_roles, randn, transformer, write_lora_experts

WAN = family("wan")
BASES: dict[str, dict[str, Any]] = {
    "wan2.1 image to video": {"in_channels": 36, "added_kv_proj_dim": 24, "image_dim": 1280},
    "wan2.2 image to video": {"in_channels": 36},
    "text to video": {},
}


@pytest.fixture
def apply(pack):
    """``apply(model, file, strength)``: the MODEL with the file, and what was warned of."""

    def apply(model: Any, path: Path, strength: float = 1.0) -> tuple[Any, list[str]]:
        loras, released = pack.module("comfy_nodes.loras"), pack.module("pdmd_core.experts.convert.released")
        source, warnings = released.open_source(path), []
        weights = released.open_lora(source.path)
        tensors = {name: weights.read(name) for name in weights.specs}
        lora = loras.Lora(tensors, source.alphas, path.name)
        return loras.apply_lora(model, lora, strength, warnings.append), warnings

    return apply


def weights_of(model: Any) -> dict[str, Tensor]:
    """The weights with which a MODEL runs."""
    model.patch_model(device_to=torch.device("cpu"))
    try:
        return {name: value.clone() for name, value in model.model.diffusion_model.state_dict().items()}
    finally:
        model.unpatch_model()


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", BASES)
def test_every_key_of_a_wan_file_of_2026_is_applied_or_named(models, apply, name: str, tmp_path: Path) -> None:
    tensors, deltas = wan_of_2026(transformer(**BASES["wan2.1 image to video"]), WAN, 1)
    if name == "text to video":  # of another width there, which would be refused
        tensors.pop("diffusion_model.patch_embedding.diff")
        deltas.pop("patch_embedding.weight")
    model = models.wan(**BASES[name])
    patched, warnings = apply(model, save(tmp_path / "x.safetensors", tensors), 0.7)
    expected = added(transformer(**BASES[name]), deltas, 0.7)
    close(weights_of(patched), {WAN.native_weight_name(key): value for key, value in expected.state_dict().items()})
    assert len(warnings) == (name != "wan2.1 image to video")
    for line in warnings:
        assert line.startswith("x.safetensors: 30 of its keys have no place in this WAN2")
        assert "cross_attn.k_img.alpha|diff_b|lora_down.weight|lora_up.weight (8)" in line, line
        assert "norm_k_img.diff (2)" in line and "text_embedding" not in line and "diff_m" not in line


def networks() -> dict[str, tuple[nn.Module, Any]]:
    """Family to a network of diffusers, and what ComfyUI loads of it."""
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        qwen = QwenImageTransformer2DModel(
            num_layers=1,
            attention_head_dim=128,
            num_attention_heads=1,
            joint_attention_dim=32,
            axes_dims_rope=(16, 56, 56),
        )
    return {"wan": (transformer(), None), "qwen_image": (qwen, qwen_state(0)), "z_image": (qwen, z_image_state(0))}


def z_image_pairs() -> Pairs:
    """For each of the projections, which ComfyUI has in one weight, and a linear layer outside of the blocks."""
    apart = diffusers_names(z_image_state(0))
    ends = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "w1.weight", "t_embedder.mlp.0.weight")
    return {
        name.removesuffix(".weight"): (
            0.3 * randn(RANK, value.shape[1], seed=n),
            0.3 * randn(len(value), RANK, seed=n + 99),
        )
        for n, (name, value) in enumerate(apart.items())
        if name.endswith(ends)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["wan", "qwen_image", "z_image"])
def test_every_layout_means_the_same(models, apply, name: str, layout: str, tmp_path: Path) -> None:
    import comfy.sd

    found = family(name)
    if name == "wan":
        model, pairs = models.wan(), pairs_of(transformer(), 1)
        before = {key: value.clone() for key, value in transformer().state_dict().items()}
    elif name == "qwen_image":
        before = qwen_state(0)
        model, pairs = models.qwen(), pairs_of(networks()["qwen_image"][0], 1)
    else:
        before, pairs = diffusers_names(z_image_state(0)), z_image_pairs()
        model = comfy.sd.load_diffusion_model_state_dict(z_image_state(0))
    tensors = with_alpha(LAYOUTS[layout](found, pairs), 1.0)
    patched, warnings = apply(model, save(tmp_path / "x.safetensors", tensors))
    assert not warnings
    deltas: Deltas = deltas_of(pairs, 1 / RANK)
    expected = {key: value + deltas.get(key, 0) for key, value in before.items()}
    after = weights_of(patched)
    if name == "wan":
        expected = {WAN.native_weight_name(key): value for key, value in expected.items()}
    elif name == "z_image":
        after = {key: value for key, value in diffusers_names(after).items() if key in expected}
    close(after, expected)


def test_keys_that_the_loader_passes_over_are_named(models, apply, tmp_path: Path) -> None:
    """DoRA of a file that trained more modules than this network has, and a part that nobody reads."""
    pairs = pairs_of(transformer(), 1, ("attn1.to_q", "attn2.to_v"))
    tensors = LAYOUTS["native"](WAN, pairs)
    weights = transformer().state_dict()
    expected = {key: value.clone() for key, value in weights.items()}
    for n, (name, (down, up)) in enumerate(pairs.items()):
        module, weight = f"diffusion_model.{WAN.lora_names.native(name)}", weights[f"{name}.weight"]
        scale = 1 + 0.1 * randn(len(weight), 1, seed=n).abs()
        tensors[f"{module}.dora_scale"] = scale * weight.norm(dim=1, keepdim=True)
        expected[f"{name}.weight"] = scale * (weight + up @ down)
    tensors["diffusion_model.blocks.0.self_attn.q.b_norm"] = torch.ones(24)
    for n in range(20):
        tensors[f"diffusion_model.blocks.{n + 7}.self_attn.q.dora_scale"] = torch.ones(24, 1)
    patched, (line,) = apply(models.wan(), save(tmp_path / "x.safetensors", tensors))
    close(weights_of(patched), {WAN.native_weight_name(key): value for key, value in expected.items()})
    assert line.startswith("x.safetensors: 21 of its keys have no place in this WAN21")
    assert "blocks.*.self_attn.q.b_norm|dora_scale (21)" in line, line


@pytest.mark.parametrize(
    "metadata", [{"ss_network_alpha": "1"}, {"lora_adapter_metadata": {"transformer.lora_alpha": 1}}]
)
def test_alpha_in_the_metadata_counts(models, apply, metadata: dict[str, Any], tmp_path: Path) -> None:
    pairs = pairs_of(transformer(), 1)
    for layout in ("native", "diffusers"):
        path = save(tmp_path / "x.safetensors", LAYOUTS[layout](WAN, pairs), **metadata)
        expected = added(transformer(), deltas_of(pairs, 1 / RANK)).state_dict()
        found = weights_of(apply(models.wan(), path)[0])
        close(found, {WAN.native_weight_name(key): value for key, value in expected.items()})


def test_a_pair_of_files_samples_as_networks_with_its_changes(
    pack, models, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Through the node, with keys that have no place named in the log."""
    import comfy.sd

    chosen = {f"lora_{k}": "none" for k in (3, 4)} | {f"strength_{k}": 1.0 for k in range(1, 5)}
    changed = []
    for k in (1, 2):
        tensors, deltas = wan_of_2026(transformer(), WAN, k)
        tensors["diffusion_model.blocks.0.cross_attn.norm_k_img.diff"] = torch.ones(24)
        chosen[f"lora_{k}"] = f"wan_2026_{k}.safetensors"
        save(base / "models/loras" / chosen[f"lora_{k}"], tensors)
        path = wan_file(tmp_path / f"{k}.safetensors", 0)
        state = added(transformer(), deltas).state_dict()
        save(path, {WAN.native_weight_name(key): value for key, value in state.items()}, config=_config(path))
        changed.append(comfy.sd.load_diffusion_model(str(path)))
    common = {"plan": plan_of(pack), "cfg": "", "set_shift": True}
    with caplog.at_level(logging.WARNING):
        (model,) = pack.call("PhasedDMDExpertsLoRA", model=models.wan(), **common, **chosen)
    said = [r.getMessage() for r in caplog.records if "have no place" in r.getMessage()]
    assert len(said) == 2 and all("blocks.*.cross_attn.norm_k_img.diff" in line for line in said)
    (expected,) = pack.call("PhasedDMDExperts", model_1=changed[0], model_2=changed[1], **common)
    outputs = [sample(pack, models, each, "wan", sigmas_of(TWO)) for each in (model, expected)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def _config(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()["config"]


def test_an_expert_of_this_project_is_a_lora_too(pack, models, base: Path, tmp_path: Path) -> None:
    """In the folder of LoRAs, without its manifest."""
    plan = PhasePlan.from_steps([4], shift=5.0)
    roles = lora_roles(plan)
    write_lora_experts(tmp_path, plan, roles)
    (base / "models/loras/own_expert.safetensors").write_bytes((tmp_path / "all_noise.safetensors").read_bytes())
    chosen = {f"lora_{k}": "none" for k in (2, 3, 4)} | {f"strength_{k}": 1.0 for k in range(1, 5)}
    common = {"plan": plan_of(pack, "4"), "cfg": "", "set_shift": True}
    (model,) = pack.call(
        "PhasedDMDExpertsLoRA", model=models.wan(), lora_1="own_expert.safetensors", **chosen, **common
    )
    (core,) = pack.call(
        "LoraLoaderModelOnly", model=models.wan(), lora_name="own_expert.safetensors", strength_model=1.0
    )
    (expected,) = pack.call("PhasedDMDExperts", model_1=core, **common)
    outputs = [sample(pack, models, each, "wan", sigmas_of(TWO)) for each in (model, expected)]
    assert torch.equal(*outputs)

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from pdmd_core.experts import ExpertsError
from pdmd_core.experts.lora.alpha import Alphas
from pdmd_core.experts.lora.file import LoraFile, read_lora
from pdmd_core.families import FAMILIES, ModelFamily, ModuleNames, family, family_of_lora
from tests.helpers.families.cases import CASES
from tests.helpers.lora_layouts import (
    LAYOUTS,
    RANK,
    Deltas,
    deltas_of,
    pairs_of,
    wan_of_2026,
    with_alpha,
    with_native_names,
)
from tests.helpers.tiny import randn

WAN = family("wan")
UNTOLD = {name for name in FAMILIES if type(family(name)).owns_lora is ModelFamily.owns_lora}
"""Families whose names in LoRA files are those of other models too."""


@functools.cache
def network(name: str) -> nn.Module:
    return CASES[name].build().transformer


def read(tensors: dict[str, Tensor], names: ModuleNames = WAN.lora_names, component: str = "transformer") -> LoraFile:
    return read_lora(tensors, Alphas(), names, "x.safetensors", component)


def same(file: LoraFile, deltas: Deltas) -> None:
    assert set(file.weights) == set(deltas)
    for name, changes in file.weights.items():
        torch.testing.assert_close(sum(change.dense() for change in changes), deltas[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_layout_means_the_same(name: str, layout: str) -> None:
    """On every linear layer, in the blocks and outside of them."""
    found = family(name)
    pairs = with_native_names(found, pairs_of(network(name), 1))
    assert len(pairs) > 15
    tensors = with_alpha(LAYOUTS[layout](found, pairs), 1.0)
    file = read(tensors, found.lora_names)
    assert not file.left_out
    same(file, deltas_of(pairs, 1 / RANK))
    told = family_of_lora([key.rpartition(".lora")[0] for key in tensors])
    assert told is None if name in UNTOLD else told is not None and told.name == name


@pytest.mark.parametrize(
    "module",
    [
        "lora_unet_double_blocks_0_img_mlp_0",
        "lora_unet_single_blocks_3_linear1",
        "transformer.transformer_blocks.0.attn.to_q",
        "diffusion_model.double_blocks.0.img_mod.lin",
        "diffusion_model.blocks.0.self_attn.q_proj",
        "diffusion_model.layers.0.attention.qkv",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    ],
)
def test_names_that_other_models_have_tell_no_family(module: str) -> None:
    """FLUX, HunyuanVideo, Stable Diffusion 3, Cosmos, Lumina, text encoders."""
    assert family_of_lora([module]) is None


def test_every_kind_of_key_of_wan_is_read() -> None:
    tensors, deltas = wan_of_2026(network("wan_image_to_video"), WAN, 1)
    file = read(tensors)
    assert not file.left_out
    assert set(deltas) == {key for key, _ in network("wan_image_to_video").named_parameters()}
    same(file, deltas)
    same(file.scaled(0.5), {name: 0.5 * value for name, value in deltas.items()})


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_weight_of_a_network_has_a_place(name: str) -> None:
    """A difference of it under its native and its own name, also where dots became underscores."""
    found = family(name)
    for weight, value in network("wan_image_to_video" if name == "wan" else name).named_parameters():
        module, _, kind = weight.rpartition(".")
        suffix = {"weight": ".diff", "bias": ".diff_b"}.get(kind)
        spelled = module if suffix else weight
        if (layout := found.lora_names.layout) is None:
            native = found.lora_names.native(spelled, is_parameter=suffix is None)
            assert native is not None, weight
        else:  # its parts are tested with products
            place = layout.find(weight, {blocks.own: 9 for blocks in layout.blocks})
            assert place is not None, weight
            native = spelled if place.sources[1:] else place.name.removesuffix(f".{kind}").removesuffix(".scale")
            native = spelled if module.endswith(tuple(layout.swapped_in_last)) else native
        for key in (native, spelled, native.replace(".", "_")):
            file = read({f"diffusion_model.{key}{suffix or '.diff'}": value}, found.lora_names)
            assert list(file.weights) == [weight], key
            assert file.weights[weight][0].shape == tuple(value.shape)


def test_projections_that_other_tools_have_in_one() -> None:
    down, up = randn(RANK, 8, seed=1), randn(24, RANK, seed=2)
    stem = "diffusion_model.layers.0.attention"
    tensors = {
        f"{stem}.qkv.lora_A.weight": down,
        f"{stem}.qkv.lora_B.weight": up,
        f"{stem}.qkv.alpha": torch.tensor(2.0),
    }
    tensors |= {f"{stem}.out.lora_A.weight": down, f"{stem}.out.lora_B.weight": up}
    parts = (0.5 * up @ down).chunk(3)
    same(
        read(tensors, family("z_image").lora_names),
        {f"layers.0.attention.to_{part}.weight": value for part, value in zip("qkv", parts, strict=True)}
        | {"layers.0.attention.to_out.0.weight": up @ down},
    )


def test_a_file_for_two_networks_is_read_by_one_of_them_at_a_time() -> None:
    pairs = pairs_of(network("wan"), 1, ("attn1.to_q",))
    first = LAYOUTS["diffusers"](WAN, pairs)
    second = {key.replace("transformer.", "transformer_2."): 2 * value for key, value in first.items()}
    same(read(first | second), deltas_of(pairs))
    assert set(read(first | second).left_out) == set(second)
    file = read(first | second, component="transformer_2")
    same(file, deltas_of(pairs, 4.0))
    assert set(file.left_out) == set(first)
    same(read(second), deltas_of(pairs, 4.0))


def test_what_a_network_has_no_place_for_is_named_and_other_shapes_are_refused() -> None:
    tensors, _ = wan_of_2026(network("wan_image_to_video"), WAN, 1)
    shapes = {name: tuple(value.shape) for name, value in network("wan_image_to_video").named_parameters()}
    text = {f"lora_te_text_model.layers.0.{half}.weight": torch.ones(2, 2) for half in ("lora_up", "lora_down")}
    file = read(tensors | text | {"something": torch.ones(1)})
    assert file.left_out == ["something", *text]
    assert file.fitted(shapes, "Wan").left_out == file.left_out
    missing = {key: shape for key, shape in shapes.items() if "add_k_proj" not in key}
    line = file.fitted(missing, "Wan").warning("Wan")
    assert line == (
        "x.safetensors: 11 of its keys have no place in this Wan and change nothing: something, "
        "lora_te_text_model.layers.*.lora_up.weight|lora_down.weight (2), "
        "diffusion_model.blocks.*.cross_attn.k_img.lora_down.weight|lora_up.weight|alpha|diff_b (8)"
    )
    with pytest.raises(ExpertsError, match=r"patch_embedding.weight has shape .* of a network of another size"):
        file.fitted(shapes | {"patch_embedding.weight": (24, 16, 1, 2, 2)}, "Wan")
    with pytest.raises(ExpertsError, match=r"none of its keys belongs to a Flux .*the file is of another model"):
        file.fitted({"other": (1,)}, "Flux")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"lora_A.weight": torch.ones(2, 3)}, "needs a down and an up"),
        ({"lora_A.weight": torch.ones(2, 3), "lora_B.weight": torch.ones(3, 1)}, "do not fit, found"),
        ({"lora_A.weight": torch.ones(0, 3), "lora_B.weight": torch.ones(3, 0)}, "do not fit, found"),
        (
            {"lora_A.weight": torch.ones(2, 3), "lora_B.weight": torch.ones(3, 2), "dora_scale": torch.ones(3, 1)},
            "DoRA is no change that is added to weights.*merge it into its base",
        ),
        ({"set_weight": torch.ones(3)}, "new weight is no change"),
        ({"hada_w1_a": torch.ones(2, 2)}, "its LoHa is not whole"),
        ({"lokr_w1": torch.ones(2, 2)}, "its LoKr is not whole"),
        ({"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(2), "lokr_w2_b": torch.ones(2, 2)}, "do not fit"),
    ],
)
def test_what_is_not_applied_is_refused_by_name(parts: dict[str, Tensor], message: str) -> None:
    module = "diffusion_model.blocks.0.self_attn.q"
    with pytest.raises(ExpertsError, match=message) as caught:
        read({f"{module}.{suffix}": value for suffix, value in parts.items()})
    assert str(caught.value).startswith(f"x.safetensors: {module}: ")
    assert "\n" not in str(caught.value)

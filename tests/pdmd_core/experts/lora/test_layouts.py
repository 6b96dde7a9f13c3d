from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pdmd_core.experts.lora.alpha import Alphas, alphas_in
from pdmd_core.experts.lora.file import LoraFile, read_lora
from pdmd_core.experts.lora.layouts import LAYOUTS, in_layout
from pdmd_core.families import FAMILIES, family
from tests.helpers.families.cases import CASES
from tests.helpers.lora_layouts import LAYOUTS as FOUND
from tests.helpers.lora_layouts import (
    RANK,
    Deltas,
    deltas_of,
    pairs_of,
    save,
    wan_of_2026,
    with_alpha,
    with_native_names,
)

WAN = family("wan")
READABLE = {"native": "native", "kohya": "kohya", "diffusers": "diffusers", "peft": "peft"}


def read(tensors: dict[str, Tensor], config: dict[str, object] | None = None, name: str = "wan") -> LoraFile:
    return read_lora(tensors, alphas_in({}, config), family(name).lora_names, "x")


def same(file: LoraFile, deltas: Deltas) -> None:
    assert set(file.weights) == set(deltas)
    for name, changes in file.weights.items():
        torch.testing.assert_close(sum(change.dense() for change in changes), deltas[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", READABLE)
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_any_layout_becomes_any_other(name: str, source: str, layout: str) -> None:
    pairs = with_native_names(family(name), pairs_of(CASES[name].build().transformer, 1))
    tensors = with_alpha(FOUND[source](family(name), pairs), 1.5)
    written = in_layout(read(tensors, name=name), family(name).lora_names, layout)
    assert not written.left_out
    assert set(FOUND[READABLE[layout]](family(name), pairs)) <= set(written.tensors)
    same(read(written.tensors, written.config, name), deltas_of(pairs, 1.5 / RANK))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_has_no_place_in_a_layout_is_listed_and_nothing_else(layout: str) -> None:
    tensors, deltas = wan_of_2026(CASES["wan_image_to_video"].build().transformer, WAN, 1)
    written = in_layout(read(tensors | {"note": torch.ones(1)}), WAN.lora_names, layout)
    back = read(written.tensors, written.config)
    assert "note" in written.left_out
    differences = {key for key in tensors if ".diff" in key}
    expected = {
        "native": set(),
        "kohya": {key for key in differences if key.endswith(".diff_m") or "emb_pos" in key},
        "diffusers": differences,
        "peft": differences,
    }[layout]
    assert set(written.left_out) == expected | {"note"}
    same(back, {name: value for name, value in deltas.items() if name in back.weights})
    assert len(back.weights) == len(deltas) - len(expected)


def test_strength_is_in_what_is_written_also_below_0() -> None:
    pairs = pairs_of(CASES["wan"].build().transformer, 1)
    file = read(FOUND["diffusers"](WAN, pairs)).scaled(-0.3)
    for layout in LAYOUTS:
        written = in_layout(file, WAN.lora_names, layout)
        assert all(float(value) > 0 for key, value in written.tensors.items() if key.endswith(".alpha"))
        same(read(written.tensors, written.config), deltas_of(pairs, -0.3))


def test_alpha_that_half_precision_does_not_hold_makes_it_float32() -> None:
    pairs = {"blocks.0.ffn.net.2": (torch.randn(4, 6).bfloat16(), torch.randn(6, 4).bfloat16())}
    down, up = (half.float() for half in pairs["blocks.0.ffn.net.2"])
    for alpha, dtype in ((2.0, torch.bfloat16), (3.0, torch.float32)):
        tensors = with_alpha(FOUND["native"](WAN, pairs), alpha)
        written = in_layout(read(tensors), WAN.lora_names, "diffusers").tensors
        assert {value.dtype for value in written.values()} == {dtype}
        product = written["transformer.blocks.0.ffn.net.2.lora_B.weight"].float() @ down
        torch.testing.assert_close(product, alpha / 4 * up @ down)


def test_peft_itself_reads_its_layout(tmp_path: Path) -> None:
    """With ranks and alphas that differ from module to module."""
    from peft import PeftModel

    network = CASES["wan"].build().transformer
    pairs = pairs_of(network, 1, ("to_q",)) | pairs_of(network, 2, ("ffn.net.2",), rank=3)
    tensors = with_alpha(FOUND["native"](WAN, pairs), 2.0)
    tensors["diffusion_model.blocks.1.ffn.2.alpha"] = torch.tensor(9.0)
    written = in_layout(read(tensors), WAN.lora_names, "peft")
    save(tmp_path / "adapter_model.safetensors", written.tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(written.config))
    model = PeftModel.from_pretrained(network, str(tmp_path))
    before = CASES["wan"].build().transformer.state_dict()
    after = model.merge_and_unload().state_dict()
    file = read(tensors)
    assert len(file.weights) == len(pairs)
    for name, value in after.items():
        change = sum(c.dense() for c in file.weights[name]) if name in file.weights else 0
        torch.testing.assert_close(value, before[name] + change, rtol=1e-5, atol=1e-5)


def test_a_family_without_such_a_name_lists_it() -> None:
    pairs = {"blocks.0.ffn.net.2": (torch.ones(2, 3), torch.ones(3, 2))}
    written = in_layout(read(FOUND["native"](WAN, pairs)), family("qwen_image").lora_names, "native")
    assert not written.tensors and len(written.left_out) == 2
    assert Alphas().scale("x", 2, None) == 1.0

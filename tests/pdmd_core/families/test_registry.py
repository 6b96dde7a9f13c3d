"""Families are found by name, by network and by LoRA keys, and no other file holds what is theirs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdmd_core.families import FAMILIES, family, family_of, family_of_lora, known_family

ROOT = Path(__file__).resolve().parents[3]
OURS = ("pdmd_core", "training", "comfy_nodes", "benchmarks/cost")


def test_every_family_is_found_by_its_name_and_its_architecture() -> None:
    for name in FAMILIES:
        found = family(name)
        assert found.name == name and type(found).__module__ == f"pdmd_core.families.{name}"
        assert type(family_of(found.architecture)) is type(found)
    assert family("wan").architecture == "WanTransformer3DModel"


def test_an_unknown_family_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError) as caught:
        family("sora")
    assert "'sora'" in str(caught.value) and all(name in str(caught.value) for name in FAMILIES)
    with pytest.raises(ValueError) as caught:
        family_of("SoraTransformer")
    assert "'SoraTransformer'" in str(caught.value) and "WanTransformer3DModel" in str(caught.value)
    assert known_family("SoraTransformer") is None


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.3.ffn.0"], "wan"),
        (["transformer.blocks.0.attn1.to_q"], "wan"),
        (["lora_unet_blocks_0_cross_attn_k"], "wan"),
        (["transformer_blocks.0.attn.to_q", "transformer_blocks.0.txt_mod.1"], "qwen_image"),
        (["lora_unet_transformer_blocks_0_img_mlp_net_2"], "qwen_image"),
        (["transformer.layers.0.attention.to_q", "transformer.noise_refiner.1.feed_forward.w1"], "z_image"),
        # of other models
        (["transformer.transformer_blocks.0.attn1.to_q", "transformer.transformer_blocks.0.attn2.to_k"], None),
        (["lora_unet_transformer_blocks_0_attn1_to_q"], None),
        (["lora_unet_double_blocks_0_img_mlp_0", "lora_unet_double_blocks_0_txt_mod_lin"], None),
        (["diffusion_model.double_blocks.0.img_mod.lin"], None),
        (["transformer_blocks.0.attn.to_q"], None),
        (["layers.0.attention.qkv", "layers.0.feed_forward.w1"], None),
        ([], None),
    ],
)
def test_a_lora_file_is_of_a_family_where_its_keys_tell(modules: list[str], expected: str | None) -> None:
    found = family_of_lora(modules)
    assert (found.name if found else None) == expected


def files() -> list[Path]:
    paths = [path for part in OURS for path in (ROOT / part).rglob("*.py")]
    return [path for path in paths if path.parent != ROOT / "pdmd_core/families"]


def strings(tree: ast.AST) -> Iterator[ast.Constant]:
    """All but docstrings."""
    documents = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            yield node


def test_no_other_file_tests_for_a_family_or_says_what_no_guidance_is() -> None:
    names = {*FAMILIES, *(family(name).architecture for name in FAMILIES)}
    no_guidance = re.compile(r"\b(guidance_scale|true_cfg_scale)=\d")
    assert len(files()) > 100
    for path in files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            tested: list[ast.expr] = []
            if isinstance(node, ast.Compare):
                tested = [node.left, *node.comparators]
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("startswith", "endswith", "get"):
                tested = node.args
            found = {each.value for side in tested for each in ast.walk(side) if isinstance(each, ast.Constant)}
            assert not found & names, f"{path}:{node.lineno}"
        if path.is_relative_to(ROOT / "benchmarks"):
            continue
        for text in strings(tree):
            assert text.value not in names, f"{path}:{text.lineno}: {text.value}"
            assert not no_guidance.search(text.value), f"{path}:{text.lineno}: {text.value}"
        if path.is_relative_to(ROOT / "pdmd_core"):
            for node in ast.walk(tree):
                if isinstance(node, ast.keyword) and node.arg in ("guidance_scale", "true_cfg_scale"):
                    assert not isinstance(node.value, ast.Constant), f"{path}:{node.value.lineno}"

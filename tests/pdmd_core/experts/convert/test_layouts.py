"""``phased-dmd convert --layout``: any LoRA file, and folders of LoRA experts, in the layout of one's choice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pdmd_core.experts import PhasedExperts
from pdmd_core.experts.__main__ import main
from pdmd_core.experts.convert.layouts import convert_layout
from pdmd_core.experts.lora.changes import Change
from pdmd_core.families import FAMILIES, family
from pdmd_core.phases import PhasePlan
from tests.helpers.conversions import HIGH, LOW, content, refused
from tests.helpers.lora_layouts import LAYOUTS, RANK, deltas_of, pairs_of, save, wan_of_2026, with_alpha
from tests.helpers.tiny import transformer

WAN = family("wan")
PAIRS = pairs_of(transformer(), 1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save(tmp_path / "kohya.safetensors", with_alpha(LAYOUTS["kohya"](WAN, PAIRS), 1.0))


def meaning(path: Path) -> dict[str, list[Change]]:
    experts = PhasedExperts.from_lora_files(PhasePlan.from_steps([2]), path)
    return dict(experts.lora_changes("all_noise").weights)


@pytest.mark.parametrize("layout", ["native", "kohya", "diffusers", "peft"])
def test_a_file_means_the_same_in_every_layout(layout: str, file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / ("folder" if layout == "peft" else "x.safetensors")
    assert convert_layout(file, output, layout) == {output.name: []}
    expected = deltas_of(PAIRS, 1.0 / RANK)
    found = meaning(output)
    assert set(found) == set(expected)
    for name, changes in found.items():
        torch.testing.assert_close(changes[0].dense(), expected[name], rtol=1e-6, atol=1e-6)
    if layout == "peft":
        assert json.loads((output / "adapter_config.json").read_text())["lora_alpha"] == 1.0
        back = tmp_path / "back.safetensors"
        convert_layout(output, back, "kohya")
        assert load_file(back).keys() == load_file(file).keys()


def test_the_command_says_what_has_no_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "wan.safetensors", wan_of_2026(transformer(), WAN, 1)[0])
    output = tmp_path / "x.safetensors"
    assert main(["convert", str(source), "--layout", "diffusers", "--output", str(output)]) == 0
    found = capsys.readouterr()
    assert found.out.splitlines() == [str(output)]
    (line,) = found.err.splitlines()
    assert "keys have no place in the layout diffusers" in line
    for key in ("blocks.*.diff_m (2)", "head.diff_m", "blocks.*.norm3.diff|diff_b (4)", "patch_embedding.diff|diff_b"):
        assert key in line
    assert "lora_down" not in line
    assert set(meaning(output)) == {f"{name}.weight" for name in PAIRS}


def test_experts_are_written_at_their_strength(lora: Path, tmp_path: Path) -> None:
    experts = PhasedExperts.open(lora)
    assert convert_layout(lora, tmp_path / "out", "diffusers") == {HIGH: [], LOW: []}
    for name in (HIGH, LOW):
        expected = experts.lora_changes(name).weights
        for weight, changes in meaning(tmp_path / "out" / f"{name}.safetensors").items():
            torch.testing.assert_close(changes[0].dense(), expected[weight][0].dense(), rtol=1e-5, atol=1e-6)
    convert_layout(lora / f"{LOW}.safetensors", tmp_path / "one.safetensors", "diffusers")
    one, two = (load_file(path) for path in (tmp_path / "one.safetensors", tmp_path / "out" / f"{LOW}.safetensors"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    convert_layout(lora, tmp_path / "peft", "peft")
    assert set(content(tmp_path / "peft")) == {
        f"{name}/{file}" for name in (HIGH, LOW) for file in ("adapter_model.safetensors", "adapter_config.json")
    }


def test_what_cannot_be_converted_is_one_line(file: Path, lora: Path, tmp_path: Path) -> None:
    attention = save(
        tmp_path / "attention.safetensors",
        {f"transformer_blocks.0.attn.to_q.lora_{half}.weight": torch.ones(2, 2) for half in "AB"},
    )
    out = tmp_path / "out.safetensors"
    with refused(f"its keys do not tell its family: give --family {' or '.join(sorted(FAMILIES))}"):
        convert_layout(attention, out, "native")
    assert convert_layout(attention, out, "native", "qwen_image") == {out.name: []}
    with refused("exists: choose another file"):
        convert_layout(file, out, "native")
    with refused("exists: choose another file"):
        convert_layout(file, file, "native", overwrite=True)
    convert_layout(file, out, "native", overwrite=True)
    with refused("a file that ends in .safetensors is expected here"):
        convert_layout(file, tmp_path / "folder", "native")
    with refused(f"the family is one of {', '.join(sorted(FAMILIES))}, found 'sora'"):
        convert_layout(file, tmp_path / "y.safetensors", "native", "sora")
    with refused("its manifest says family wan, --family says qwen_image"):
        convert_layout(lora, tmp_path / "folder", "native", "qwen_image")
    with refused("no such file"):
        convert_layout(tmp_path / "none.safetensors", tmp_path / "y.safetensors", "native")
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part") or path.name.startswith(".")]

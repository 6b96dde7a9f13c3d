from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from pdmd_core.experts import ExpertsError, read_manifest
from pdmd_core.experts.convert.conversions import Conversion
from pdmd_core.experts.convert.output import in_units
from pdmd_core.experts.folder import PhasedExperts
from pdmd_core.experts.inspect import inspect, report_text
from pdmd_core.phases import PhasePlan
from tests.helpers.tiny import lora_roles, save_wan_pipeline, wan_pipeline, write_lora_experts

PLAN = PhasePlan.from_steps([2, 2], shift=5.0)
RANK, ALPHA = 4, 6.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experts folder of two LoRA experts; not to be changed."""
    root = tmp_path_factory.mktemp("inspect")
    base = save_wan_pipeline(root / "base")
    write_lora_experts(root / "experts", PLAN, lora_roles(PLAN, RANK, ALPHA), str(base), {"updates": 3})
    return root / "experts"


def parameters(path: Path) -> int:
    tensors = safetensors.torch.load_file(path)
    return sum(value.numel() for key, value in tensors.items() if not key.endswith(".alpha"))


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    return path


def lora(prefix: str, down: str, up: str, alpha: float | None = None, rank: int = 8) -> dict[str, Tensor]:
    """A LoRA of two modules in a key format."""
    tensors = {}
    join = "_" if prefix == "lora_unet_" else "."
    for module in ("blocks.0.self_attn.q", "blocks.1.ffn.0"):
        name = prefix + module.replace(".", join)
        tensors |= {f"{name}{down}": torch.ones(rank, 6), f"{name}{up}": torch.ones(6, rank).to(torch.float32)}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


# --- our own files ----------------------------------------------------------


def test_a_folder_says_base_plan_and_every_expert(folder: Path) -> None:
    report, manifest = inspect(folder), read_manifest(folder)
    assert report["what"] == "experts"
    assert report["base"]["model"] == manifest.base.model and report["base"]["family"] == "wan"
    assert PhasePlan.from_dict(report["plan"]) == PLAN and report["plan_table"] == PLAN.describe()
    assert report["training"] == {"updates": 3} and report["guidance_scale"] == 1.0
    assert [entry["name"] for entry in report["experts"]] == ["high_noise", "low_noise"]
    for entry in report["experts"]:
        assert (entry["kind"], entry["rank"], entry["alpha"], entry["component"]) == (
            "lora",
            RANK,
            ALPHA,
            "transformer",
        )
        assert entry["parameters"] == parameters(folder / entry["file"]) and entry["dtypes"] == ["float32"]
        assert entry["tensors"] == 60 and entry["bytes"] == 4 * entry["parameters"] + 4 * 20
    assert json.loads(json.dumps(report)) == report
    text = report_text(report)
    for words in (PLAN.describe().splitlines()[1].strip(), "lora, rank 4, alpha 6", "1 (none)", manifest.base.model):
        assert words in text


def test_a_single_file_explains_itself(folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "renamed.safetensors"
    alone.write_bytes((folder / "low_noise.safetensors").read_bytes())
    report = inspect(alone)
    assert (report["what"], report["expert"]) == ("expert", "low_noise")
    assert PhasePlan.from_dict(report["plan"]) == PLAN
    assert [entry["name"] for entry in report["experts"]] == ["low_noise"]
    assert report["experts"][0]["parameters"] == parameters(alone)
    text = report_text(report)
    assert "expert low_noise of a phased distillation" in text and "diffusion_model.blocks.0.cross_attn.k.alpha" in text


def test_full_experts_and_comfyui_files_too(folder: Path, tmp_path: Path) -> None:
    Conversion(PhasedExperts.open(folder), tmp_path / "full").to_full()
    Conversion(PhasedExperts.open(folder), tmp_path / "comfy", dtype=torch.bfloat16).to_comfyui()
    (entry, _) = inspect(tmp_path / "full")["experts"]
    assert entry["kind"] == "full" and entry["rank"] is None
    assert entry["parameters"] == sum(p.numel() for p in wan_pipeline().transformer.parameters())
    report = inspect(tmp_path / "comfy" / "high_noise.safetensors")
    assert report["experts"][0]["dtypes"] == ["bfloat16", "float32"], "the dtype of most parameters first"
    assert "blocks.0.cross_attn.k.bias" in report_text(report)


def test_a_file_whose_metadata_is_damaged_is_one_line(folder: Path, tmp_path: Path) -> None:
    with safe_open(folder / "low_noise.safetensors", "pt") as file:
        carried = json.loads(file.metadata()["phased_experts"])
    unknown = carried | {"expert": "middle"}
    for text in ("{", "[]", "{}", '{"expert": 1, "manifest": {}}', json.dumps(unknown), "[" * 100_000):
        path = save(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {"phased_experts": text})
        with pytest.raises(ExpertsError, match="metadata is not that of a phased expert") as caught:
            inspect(path)
        assert len(str(caught.value).splitlines()) == 1


# --- files of others --------------------------------------------------------

FORMATS = {
    "Wan2.2-Lightning": ("diffusion_model.", ".lora_down.weight", ".lora_up.weight", 8.0),
    "ComfyUI PEFT": ("diffusion_model.", ".lora_A.weight", ".lora_B.weight", None),
    "kohya": ("lora_unet_", ".lora_down.weight", ".lora_up.weight", 4.0),
    "diffusers": ("transformer.", ".lora_A.weight", ".lora_B.weight", None),
    "diffusers second": ("transformer_2.", ".lora_A.weight", ".lora_B.weight", None),
    "PEFT": ("base_model.model.", ".lora_A.weight", ".lora_B.weight", None),
    "PEFT adapter": ("base_model.model.", ".lora_A.default.weight", ".lora_B.default.weight", None),
    "Qwen-Image-Lightning": ("", ".lora_down.weight", ".lora_up.weight", 8.0),
    "old diffusers": ("transformer.", ".lora.down.weight", ".lora.up.weight", None),
}


@pytest.mark.parametrize("name", FORMATS)
def test_third_party_loras_are_told_apart(name: str, tmp_path: Path) -> None:
    prefix, down, up, alpha = FORMATS[name]
    report = inspect(save(tmp_path / "x.safetensors", lora(prefix, down, up, alpha), {"software": "theirs"}))
    assert report["what"] == "LoRA" and report["prefix"] == prefix
    assert (report["modules"], report["blocks"], report["ranks"]) == (2, 2, [8])
    assert report["alphas"] == ([alpha] if alpha else [])
    assert set(report["parts"]) == {down, up, *([".alpha"] if alpha else [])}
    assert (report["unpaired_modules"], report["other_keys"]) == (0, 0)
    assert report["parameters"] == 4 * 8 * 6 and report["metadata"] == {"software": "theirs"}
    assert report["family"] == "wan"
    text = report_text(report)
    assert (f"alpha       {alpha:g}" if alpha else "none: the same as the rank") in text
    assert report["layout"] in text and "rank        8" in text


def test_what_stands_beside_a_lora_is_counted(tmp_path: Path) -> None:
    tensors = lora("diffusion_model.", ".lora_down.weight", ".lora_up.weight", 8.0)
    tensors |= lora("transformer.", ".lora_A.weight", ".lora_B.weight", rank=2)
    tensors.pop("transformer.blocks.1.ffn.0.lora_B.weight")
    tensors |= {"diffusion_model.blocks.0.norm3.diff": torch.ones(2), "diffusion_model.head.head.weight": torch.ones(2)}
    report = inspect(save(tmp_path / "x.safetensors", tensors))
    assert report["ranks"] == [2, 8] and report["modules"] == 5 and report["differences"] == 1
    assert (report["unpaired_modules"], report["other_keys"]) == (1, 1)
    text = report_text(report)
    assert "1 module(s) lack one half" in text and "and others" in text and "1 that are no LoRA's" in text
    assert "1 of whole weights and biases" in text


def test_an_alpha_in_the_metadata_is_said(tmp_path: Path) -> None:
    tensors = lora("transformer.", ".lora_A.weight", ".lora_B.weight")
    inside = json.dumps({"transformer.r": 8, "transformer.lora_alpha": 16})
    report = inspect(save(tmp_path / "x.safetensors", tensors, {"lora_adapter_metadata": inside}))
    assert report["alphas"] == [] and report["alpha_in_metadata"] == [16.0]
    assert "16 in the metadata only, which most programs pass over" in report_text(report)
    for odd in ("[]", "{", '{"lora_alpha": []}', '{"lora_alpha": "x"}'):
        report = inspect(save(tmp_path / "y.safetensors", tensors, {"lora_adapter_metadata": odd}))
        assert report["alpha_in_metadata"] is None


def test_loras_that_diffusers_itself_saves_are_read(tmp_path: Path) -> None:
    roles = lora_roles(PLAN, RANK, ALPHA)
    state = {}
    for key, value in roles.state_dict("high_noise").items():
        state[f"{key.replace('.lora_A', '.lora_A.weight').replace('.lora_B', '.lora_B.weight')}"] = value
    wan_pipeline().save_lora_weights(tmp_path, transformer_lora_layers=state)
    report = inspect(tmp_path / "pytorch_lora_weights.safetensors")
    assert (report["prefix"], report["modules"], report["ranks"], report["alphas"]) == ("transformer.", 20, [RANK], [])


def test_weights_of_any_other_kind_are_described(tmp_path: Path) -> None:
    report = inspect(save(tmp_path / "x.safetensors", {"a.weight": torch.ones(3, 2), "b": torch.ones(2).half()}))
    assert report["what"] == "weights" and report["parameters"] == 8
    assert report["dtypes"] == ["float32", "float16"] and report["first_keys"] == ["a.weight", "b"]
    assert "8 parameters, 2 tensors, 28 B in float32, float16" in report_text(report)
    empty = inspect(save(tmp_path / "y.safetensors", {}))
    assert empty["tensors"] == 0 and report_text(empty)


def test_long_metadata_is_shortened(tmp_path: Path) -> None:
    report = inspect(save(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {"k": "v" * 10_000}))
    assert len(report["metadata"]["k"]) == 200


def test_only_the_header_of_a_large_file_is_read(tmp_path: Path) -> None:
    size = 64 * 2**30
    header: dict[str, Any] = {"a.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)  # sparse: takes no room on the disk
    start = time.monotonic()
    report = inspect(path)
    assert report["bytes"] == size and time.monotonic() - start < 5
    assert "68.7 GB" in report_text(report)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.safetensors", None, "no such file"),
        ("x", None, "no such file or folder"),
        ("x.pt", b"pickle", "only safetensors files and experts folders are read"),
        ("x.safetensors", b"pickle", "not a readable safetensors file"),
        ("x.safetensors", b"", "not a readable safetensors file"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ExpertsError, match=message) as caught:
        inspect(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1 and str(tmp_path / name) in str(caught.value)


def test_a_folder_without_a_manifest_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ExpertsError, match=r"no phased_experts\.json here"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (28_600_000_000, "28.6 GB"), (10**16, "10000.0 TB")],
)
def test_sizes_are_in_decimal_units(nbytes: int, text: str) -> None:
    assert in_units(nbytes) == text

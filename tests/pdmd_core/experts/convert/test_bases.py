from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pdmd_core.experts import (
    MANIFEST_NAME,
    BaseModel,
    Expert,
    Manifest,
    lora_to_file,
    read_manifest,
    write_experts,
)
from pdmd_core.experts.__main__ import main
from pdmd_core.experts.base_files import BaseFiles
from pdmd_core.experts.convert.conversions import Conversion
from pdmd_core.experts.format.fingerprint import fingerprint_of
from pdmd_core.phases import PhasePlan
from tests.helpers.conversions import (
    TARGETS,
    WAN,
    content,
    conversion,
    refused,
)
from tests.helpers.tiny import save_wan_pipeline, transformer, wan_pipeline


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_damaged_expert_is_refused_by_its_hash(
    lora: Path, full: Path, tmp_path: Path, kind: str, target: Callable[[Conversion], object]
) -> None:
    shutil.copytree({"lora": lora, "full": full}[kind], tmp_path / "experts")
    path = tmp_path / "experts" / "low_noise.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with refused("low_noise.safetensors", "sha256 is", "download it again"):
        target(conversion(tmp_path / "experts", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def other_base(tmp_path: Path, change: Callable[[dict[str, Any]], object], file: str) -> str:
    folder = save_wan_pipeline(tmp_path / "other")
    path = folder / file
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_base_that_does_not_fit_is_named(lora: Path, full: Path, tmp_path: Path, kind: str) -> None:
    experts = {"lora": lora, "full": full}[kind]
    for file, change, fragments in (
        ("transformer/config.json", lambda c: c.update(num_attention_heads=4), ("has shape", "takes")),
        ("transformer/config.json", lambda c: c.update(num_layers=1), ("blocks.1.",)),
        (
            "transformer/config.json",
            lambda c: c.update(_class_name="SoraModel"),
            ("SoraModel", "WanTransformer3DModel"),
        ),
        ("transformer/config.json", lambda c: c.clear(), ("is a None",)),
    ):
        wrong = other_base(tmp_path, change, file)
        with refused("--base" if kind == "x" else "base", *fragments):
            conversion(experts, tmp_path / "out", base=wrong).to_full()
        shutil.rmtree(tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_a_base_whose_weights_are_not_those_of_its_config_is_refused(lora: Path, tmp_path: Path) -> None:
    wrong = save_wan_pipeline(tmp_path / "other")
    file = wrong / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors.pop("proj_out.bias")
    safetensors.torch.save_file(tensors, file)
    with refused("lacks proj_out.bias"):
        conversion(lora, tmp_path / "out", base=str(wrong)).to_full()
    file.unlink()
    with refused("diffusion_pytorch_model.safetensors", "no such file"):
        conversion(lora, tmp_path / "out", base=str(wrong)).to_full()
    file.write_bytes(b"text")
    with refused("not a readable safetensors file"):
        conversion(lora, tmp_path / "out", base=str(wrong)).to_full()


def test_a_conversion_notes_the_weights_that_it_read_and_warns_of_others(
    lora: Path, full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = wan_pipeline()
    with torch.no_grad():
        for block in tuned.transformer.blocks:
            block.attn1.to_q.weight.mul_(1.03)
            block.ffn.net[2].weight.mul_(1.03)
    tuned.save_pretrained(tmp_path / "tuned")
    own, other = fingerprint_of(transformer()), fingerprint_of(tuned.transformer)
    said: list[str] = []
    options = {"base": str(tmp_path / "tuned"), "warn": said.append}
    manifest = conversion(full, tmp_path / "extracted", **options).to_lora(2)
    assert manifest.base.fingerprints == {"transformer": other} and own != other
    assert len(said) == 1 and "2 of 26 samples differ" in said[0] and str(tmp_path / "tuned") in said[0]
    manifest = conversion(tmp_path / "extracted", tmp_path / "merged", **options).to_full()
    assert manifest.base.fingerprints == {"transformer": other} and len(said) == 1
    # full experts stand on no base: what was known of it stays
    manifest = conversion(full, tmp_path / "copied", dtype=torch.bfloat16, **options).to_full()
    assert manifest.base.fingerprints == {"transformer": own} and len(said) == 1
    command = ["convert", str(tmp_path / "extracted"), "--to", "full", "--output", str(tmp_path / "own")]
    capsys.readouterr()
    assert main(command) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("phased-dmd: warning: ") and "2 of 26 samples differ" in line
    assert read_manifest(tmp_path / "own").base.fingerprints == {"transformer": own}


@pytest.mark.parametrize("name", ["nowhere/at/all", "../nowhere", "-"])
def test_a_base_that_is_nowhere_is_one_line(
    lora: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with refused(f"base {name!r}", "give --base"):
        conversion(lora, tmp_path / "out", base=name).to_full()
    (tmp_path / "empty").mkdir()
    with refused("no readable model_index.json"):
        conversion(lora, tmp_path / "out", base=str(tmp_path / "empty")).to_full()


def test_a_base_without_one_of_its_parts_is_named(lora: Path, tmp_path: Path) -> None:
    wrong = save_wan_pipeline(tmp_path / "other")
    shutil.rmtree(wrong / "vae")
    with refused("vae is missing"):
        conversion(lora, tmp_path / "out", base=str(wrong)).to_diffusers()


def test_too_large_a_rank_is_named_before_the_work(full: Path, tmp_path: Path) -> None:
    with refused("--rank 25", "24x24", "at most 24"):
        conversion(full, tmp_path / "out").to_lora(25)
    assert conversion(full, tmp_path / "out").to_lora(24).experts[0].rank == 24


def test_an_unknown_family_and_another_architecture_are_one_line(lora: Path, tmp_path: Path) -> None:
    for change, fragments in (
        ({"family": "sora"}, ("'sora'", "expected one of: ", "wan")),
        ({"architecture": "SoraModel"}, ("WanTransformer3DModel", "SoraModel")),
    ):
        shutil.copytree(lora, tmp_path / "experts")
        manifest = read_manifest(tmp_path / "experts")
        changed = replace(manifest, base=replace(manifest.base, **change))
        (tmp_path / "experts" / MANIFEST_NAME).write_text(changed.to_json())
        for target in TARGETS.values():
            with refused(*fragments):
                target(conversion(tmp_path / "experts", tmp_path / "out"))
        shutil.rmtree(tmp_path / "experts")


def test_a_lora_of_a_module_that_the_base_lacks_is_named(base: Path, tmp_path: Path) -> None:
    state = {"blocks.5.attn1.to_q.lora_A": torch.ones(2, 24), "blocks.5.attn1.to_q.lora_B": torch.ones(24, 2)}
    entry = Expert("all_noise", "x.safetensors", "lora", "", rank=2, alpha=1.0, targets=("attn1.to_q",))
    plan = PhasePlan.from_steps([1], shift=5.0)
    manifest = Manifest(BaseModel(str(base), WAN.architecture, "wan"), plan, (entry,))
    write_experts(tmp_path / "experts", manifest, {"all_noise": lora_to_file(state, 1.0, WAN)})
    with refused("x.safetensors adapts blocks.5.attn1.to_q", "does not have"):
        conversion(tmp_path / "experts", tmp_path / "out").to_full()


# --- the base on the Hub ----------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "target_name", "weights", "others"),
    [
        ("full", "comfyui", False, False),
        ("full", "full", False, False),
        ("lora", "full", True, False),
        ("full", "lora", True, False),
        ("full", "diffusers", False, True),
        ("lora", "diffusers", True, True),
    ],
)
def test_only_what_is_needed_of_a_hub_base_is_downloaded(
    lora: Path,
    full: Path,
    base: Path,
    tmp_path: Path,
    kind: str,
    target_name: str,
    weights: bool,
    others: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def download(repo_id: str, revision: str | None, **patterns: Any) -> str:
        files = [*content(base), "transformer/pytorch_model.bin"]
        target = tmp_path / "snapshot"
        for file in filter_repo_objects(files, **patterns):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(base / file, target / file)
        asked.update(repo_id=repo_id, revision=revision, files=set(content(target)))
        return str(target)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    shutil.copytree({"lora": lora, "full": full}[kind], tmp_path / "experts")
    manifest = read_manifest(tmp_path / "experts")
    changed = replace(manifest, base=replace(manifest.base, model="user/wan", revision="abc"))
    (tmp_path / "experts" / MANIFEST_NAME).write_text(changed.to_json())
    TARGETS[target_name](conversion(tmp_path / "experts", tmp_path / "out"))
    assert (asked["repo_id"], asked["revision"]) == ("user/wan", "abc")
    assert ("transformer/diffusion_pytorch_model.safetensors" in asked["files"]) == weights
    assert ("vae/diffusion_pytorch_model.safetensors" in asked["files"]) == others
    assert "transformer/config.json" in asked["files"]


def test_shapes_come_from_the_config_alone(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    files = BaseFiles.find(BaseModel(str(tmp_path / "base"), WAN.architecture, "wan"), None, networks=False)
    expected = {name: tuple(value.shape) for name, value in transformer().state_dict().items()}
    assert files.shapes("transformer") == expected

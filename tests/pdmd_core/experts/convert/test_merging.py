from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from pdmd_core.experts import (
    MANIFEST_NAME,
    Manifest,
    PhasedExperts,
    read_manifest,
)
from pdmd_core.experts.format.fingerprint import fingerprint_of
from pdmd_core.experts.format.header import read_header
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.conversions import (
    ALPHA,
    HIGH,
    LOW,
    PLAN,
    RANK,
    WAN,
    content,
    conversion,
    refused,
    rewrite,
    sampled,
)
from tests.helpers.tiny import CALL, LATENT_SHAPE, randn, transformer, wan_pipeline


def test_merged_experts_sample_what_the_lora_experts_sample(lora: Path, full: Path) -> None:
    assert [e.kind for e in read_manifest(full).experts] == ["full", "full"]
    expected = sampled(lora)
    torch.testing.assert_close(sampled(full), expected, rtol=1e-4, atol=1e-5)
    teacher = wan_pipeline(PhasedDMDScheduler.from_plan(PLAN))
    call = CALL | {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    plain = teacher(**call, latents=randn(1, *LATENT_SHAPE, seed=7)).frames
    assert (plain - expected).abs().max() > 0.01


def test_merging_adds_the_scaled_product_and_touches_nothing_else(lora: Path, full: Path) -> None:
    before = transformer().state_dict()
    adapted = {f"blocks.{block}.{target}.weight" for block in (0, 1) for target in WAN.lora_targets}
    for name in (HIGH, LOW):
        state, after = PhasedExperts.open(lora).lora_state(name), PhasedExperts.open(full).tensors(name)
        assert set(after) == set(before)
        for key, value in after.items():
            if key in adapted:
                module = key.removesuffix(".weight")
                product = state[f"{module}.lora_B"].double() @ state[f"{module}.lora_A"].double()
                expected = before[key].double() + ALPHA / RANK * product
                torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(value, before[key]), key


def test_a_merged_folder_is_a_whole_experts_folder(lora: Path, full: Path) -> None:
    manifest, origin = read_manifest(full), read_manifest(lora)
    assert (manifest.plan, manifest.guidance_scale) == (origin.plan, origin.guidance_scale)
    read = {"transformer": fingerprint_of(transformer())}
    assert origin.base.fingerprints is None and manifest.base == replace(origin.base, fingerprints=read)
    note = {"to": "full", "arithmetic": "float32", "stored_as": {HIGH: ["float32"], LOW: ["float32"]}}
    assert manifest.training == {"updates": 3, "conversions": [note]}
    assert PhasedDMDScheduler.from_pretrained(full, subfolder="scheduler").plan == PLAN
    card = (full / "README.md").read_text(encoding="utf-8")
    assert f"load_phased_pipeline({json.dumps(full.as_posix())})" in card
    for expert in manifest.experts:
        carried = json.loads(read_header(full / expert.file).metadata["phased_experts"])
        assert carried["expert"] == expert.name
        unhashed = replace(manifest, experts=tuple(replace(e, sha256="0" * 64) for e in manifest.experts))
        assert Manifest.from_dict(carried["manifest"]) == unhashed
    assert set(content(full)) == {
        MANIFEST_NAME,
        "README.md",
        "high_noise.safetensors",
        "low_noise.safetensors",
        "scheduler/scheduler_config.json",
    }


def test_equal_conversions_are_equal_files(lora: Path, full: Path, tmp_path: Path) -> None:
    conversion(lora, tmp_path / "again").to_full()
    again, first = content(tmp_path / "again"), content(full)
    assert all(again[name] == data for name, data in first.items() if name != "README.md")


def test_each_expert_is_merged_into_the_component_that_it_belongs_to(lora: Path, base: Path, tmp_path: Path) -> None:
    pipeline = wan_pipeline()
    pipeline.register_modules(transformer_2=transformer(seed=9))
    pipeline.save_pretrained(tmp_path / "two")
    shutil.copytree(lora, tmp_path / "experts")
    manifest = read_manifest(tmp_path / "experts")
    second = replace(manifest.experts[1], component="transformer_2")
    changed = replace(manifest, experts=(manifest.experts[0], second))
    (tmp_path / "experts" / MANIFEST_NAME).write_text(changed.to_json())
    conversion(tmp_path / "experts", tmp_path / "full", base=str(tmp_path / "two")).to_full()
    experts = PhasedExperts.open(tmp_path / "full")
    for name, seed in ((HIGH, 0), (LOW, 9)):
        expected = transformer(seed).proj_out.weight
        assert torch.equal(experts.tensors(name)["proj_out.weight"], expected)
    assert experts.manifest.experts[1].component == "transformer_2"
    with refused("transformer_2 has no readable config.json"):
        conversion(tmp_path / "experts", tmp_path / "x", base=str(base)).to_full()


def test_a_dtype_is_stored_but_for_what_diffusers_keeps_in_float32(lora: Path, full: Path, tmp_path: Path) -> None:
    conversion(lora, tmp_path / "out", dtype=torch.bfloat16).to_full()
    exact, half = PhasedExperts.open(full), PhasedExperts.open(tmp_path / "out")
    kept = re.compile(r"time_embedder|scale_shift_table|norm2")
    for name in (HIGH, LOW):
        precise = exact.tensors(name)
        for key, value in half.tensors(name).items():
            assert value.dtype == (torch.float32 if kept.search(key) else torch.bfloat16), key
            assert torch.equal(value, precise[key].to(value.dtype)), "merged in float32, then rounded once"
    note = half.manifest.training["conversions"][-1]
    assert note["stored_as"] == {HIGH: ["bfloat16", "float32"], LOW: ["bfloat16", "float32"]}
    conversion(full, tmp_path / "again", dtype=torch.bfloat16).to_full()
    for name in (HIGH, LOW):
        again = PhasedExperts.open(tmp_path / "again").tensors(name)
        assert all(torch.equal(again[key], value) for key, value in half.tensors(name).items())


def test_a_half_precision_base_keeps_its_dtype_unless_another_is_asked_for(lora: Path, tmp_path: Path) -> None:
    pipeline = wan_pipeline()
    pipeline.transformer.to(torch.bfloat16)
    pipeline.save_pretrained(tmp_path / "half")
    own = WanTransformer3DModel.load_config(tmp_path / "half", subfolder="transformer")
    assert own["_class_name"] == "WanTransformer3DModel"
    for dtype, expected in ((None, {torch.bfloat16}), (torch.float32, {torch.float32})):
        out = tmp_path / f"out {dtype}"
        conversion(lora, out, base=str(tmp_path / "half"), dtype=dtype).to_full()
        assert {value.dtype for value in PhasedExperts.open(out).tensors(HIGH).values()} == expected


def test_values_beyond_a_dtype_are_refused_and_nothing_is_written(full: Path, tmp_path: Path) -> None:
    shutil.copytree(full, tmp_path / "experts")
    rewrite(tmp_path / "experts", LOW, lambda t: t["proj_out.weight"].fill_(1e6))
    with refused("proj_out.weight", "not finite in float16", "another dtype"):
        conversion(tmp_path / "experts", tmp_path / "out", dtype=torch.float16).to_full()
    assert {path.name for path in tmp_path.iterdir()} == {"experts"}

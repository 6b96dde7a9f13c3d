from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline, WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor

from pdmd_core.experts import (
    Manifest,
    PhasedExperts,
)
from pdmd_core.experts.convert import conversions as convert_module
from pdmd_core.experts.convert.conversions import write_network
from pdmd_core.experts.format.header import TensorSpec, read_header
from pdmd_core.experts.format.weights import Weights
from pdmd_core.phases import PhasePlan
from pdmd_core.pipelines import load_phased_pipeline
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.conversions import (
    HIGH,
    LOW,
    PLAN,
    content,
    conversion,
    refused,
    sampled,
    write_lora_folder,
)
from tests.helpers.tiny import CALL, LATENT_SHAPE, randn

# --- ComfyUI ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_comfyui_files_come_back_bit_for_bit_through_diffusers_own_converter(
    lora: Path, full: Path, base: Path, tmp_path: Path, kind: str
) -> None:
    conversion({"lora": lora, "full": full}[kind], tmp_path / "comfy").to_comfyui()
    assert set(content(tmp_path / "comfy")) == {"high_noise.safetensors", "low_noise.safetensors"}
    for name in (HIGH, LOW):
        path, expected = tmp_path / "comfy" / f"{name}.safetensors", PhasedExperts.open(full).tensors(name)
        native = safetensors.torch.load_file(path)
        assert "head.modulation" in native and "blocks.1.cross_attn.norm_q.weight" in native
        back = convert_wan_transformer_to_diffusers(native)
        assert set(back) == set(expected)
        assert all(torch.equal(back[key], value) for key, value in expected.items())
        network = WanTransformer3DModel.from_single_file(path, config=str(base), subfolder="transformer")
        state = network.state_dict()
        assert set(state) == set(expected) and all(torch.equal(state[k], v) for k, v in expected.items())


def test_comfyui_files_explain_themselves(full: Path, tmp_path: Path) -> None:
    manifest = conversion(full, tmp_path / "comfy", dtype=torch.bfloat16).to_comfyui()
    metadata = read_header(tmp_path / "comfy" / "low_noise.safetensors").metadata
    carried = json.loads(metadata["phased_experts"])
    assert carried["expert"] == LOW and Manifest.from_dict(carried["manifest"]) == manifest
    config = json.loads(metadata["config"])["transformer"]
    assert config == {"num_heads": 2, "text_dim": 32, "freq_dim": 32}
    assert metadata["format"] == "pt"


# --- a stock pipeline -------------------------------------------------------


def pipeline_latents(pipeline: WanPipeline, steps: int) -> Tensor:
    call = CALL | {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent"}
    return pipeline(**call, latents=randn(1, *LATENT_SHAPE, seed=7)).frames


@pytest.mark.parametrize(("kind", "shard"), [("lora", None), ("full", 20_000)])
def test_the_stock_folder_samples_in_a_stock_pipeline_what_the_experts_sample(
    lora: Path, full: Path, tmp_path: Path, kind: str, shard: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shard:
        monkeypatch.setattr(convert_module, "MAX_SHARD_BYTES", shard)
    out = tmp_path / "stock"
    conversion({"lora": lora, "full": full}[kind], out).to_diffusers()
    shards = list((out / "transformer").glob("*.safetensors"))
    assert (len(shards) > 3) if shard else (len(shards) == 1)
    assert all(path.stat().st_size < 40_000 for path in shards) or not shard
    pipeline = DiffusionPipeline.from_pretrained(out)
    assert type(pipeline) is WanPipeline and type(pipeline.scheduler) is PhasedDMDScheduler
    pipeline.set_progress_bar_config(disable=True)
    assert PLAN.phases[0].sigmas[-1] > pipeline.config.boundary_ratio > PLAN.phases[1].sigmas[0]
    torch.testing.assert_close(pipeline_latents(pipeline, 4), sampled(lora), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pipeline_latents(load_phased_pipeline(out), 4), sampled(lora), rtol=1e-4, atol=1e-5)
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert code
    variables: dict[str, Any] = {}
    exec(code[1], variables)  # noqa: S102 - the code that users are told to run
    assert isinstance(variables["pipe"].scheduler, PhasedDMDScheduler)


def test_one_expert_is_a_stock_pipeline_of_one_network(base: Path, tmp_path: Path) -> None:
    plan = PhasePlan.from_steps([3], shift=5.0)
    experts = write_lora_folder(tmp_path / "experts", base, plan)
    conversion(experts, tmp_path / "stock").to_diffusers()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "stock")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer_2 is None and pipeline.config.boundary_ratio is None
    torch.testing.assert_close(pipeline_latents(pipeline, 3), sampled(experts), rtol=1e-4, atol=1e-5)


def test_three_experts_are_too_many_for_a_stock_wan_pipeline(base: Path, tmp_path: Path) -> None:
    experts = write_lora_folder(tmp_path / "experts", base, PhasePlan.from_steps([1, 1, 1], shift=5.0))
    with refused("transformer, then transformer_2", "transformer_3"):
        conversion(experts, tmp_path / "out").to_diffusers()
    conversion(experts, tmp_path / "full").to_full()
    torch.testing.assert_close(sampled(tmp_path / "full"), sampled(experts), rtol=1e-4, atol=1e-5)


def test_sharded_bases_are_read(lora: Path, full: Path, base: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    shutil.copytree(base, sharded)
    shutil.rmtree(sharded / "transformer")
    WanTransformer3DModel.from_pretrained(base, subfolder="transformer").save_pretrained(
        sharded / "transformer", max_shard_size="30KB"
    )
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 2
    conversion(lora, tmp_path / "out", base=str(sharded)).to_full()
    for name in (HIGH, LOW):
        found, expected = PhasedExperts.open(tmp_path / "out").tensors(name), PhasedExperts.open(full).tensors(name)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    index = sharded / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    for text, message in (("{", "not a list of weight files"), ('{"weight_map": {"x": "../y"}}', "another folder")):
        index.write_text(text)
        with refused(message, "download the base again"):
            conversion(lora, tmp_path / "x", base=str(sharded)).to_full()


def test_write_network_splits_between_tensors_only(tmp_path: Path) -> None:
    specs = {str(i): TensorSpec(torch.float32, (10,)) for i in range(5)}
    weights = Weights(specs, lambda name: torch.full((10,), float(name)))
    write_network(tmp_path / "a", weights, {}, max_bytes=80)
    index = json.loads((tmp_path / "a" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200
    files = [index["weight_map"][name] for name in specs]
    assert [files.count(name) for name in sorted(set(files))] == [2, 2, 1]
    for name, file in index["weight_map"].items():
        assert safetensors.torch.load_file(tmp_path / "a" / file)[name].eq(float(name)).all()
    write_network(tmp_path / "b", weights, {}, max_bytes=1)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == 5

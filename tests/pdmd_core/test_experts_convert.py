from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline, WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors import safe_open
from torch import Tensor

from pdmd_core.experts import (
    MANIFEST_NAME,
    BaseModel,
    Expert,
    ExpertsError,
    Manifest,
    PhasedExperts,
    lora_to_file,
    read_manifest,
    write_experts,
)
from pdmd_core.experts import convert as convert_module
from pdmd_core.experts.base_files import BaseFiles
from pdmd_core.experts.convert import Conversion, write_network
from pdmd_core.experts.files import sha256_of
from pdmd_core.experts.low_rank import EXACT_SIZE, extract, factorise
from pdmd_core.experts.header import DTYPES, TensorSpec, read_header
from pdmd_core.experts.weights import Weights, open_weights, write_weights
from pdmd_core.families import family
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import Roles, RoleSpec
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.tiny import (
    CALL,
    LATENT_SHAPE,
    lora_roles,
    randn,
    save_wan_pipeline,
    transformer,
    wan_pipeline,
    write_lora_experts,
)

PLAN = PhasePlan.from_steps([2, 2], shift=5.0)
WAN = family("wan")
RANK, ALPHA = 4, 6.0
HIGH, LOW = "high_noise", "low_noise"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock pipeline on disk."""
    return save_wan_pipeline(tmp_path_factory.mktemp("base") / "wan")


def write_lora_folder(folder: Path, base: Path, plan: PhasePlan = PLAN) -> Path:
    write_lora_experts(folder, plan, lora_roles(plan, RANK, ALPHA), str(base), {"updates": 3})
    PhasedDMDScheduler.from_plan(plan).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """An experts folder of two LoRA experts; not to be changed."""
    return write_lora_folder(tmp_path_factory.mktemp("lora") / "experts", base)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, lora: Path) -> Path:
    """The same, merged; not to be changed."""
    folder = tmp_path_factory.mktemp("full") / "experts"
    conversion(lora, folder).to_full()
    return folder


def conversion(folder: Path, output: Path, **options: Any) -> Conversion:
    return Conversion(PhasedExperts.open(folder), output, **options)


@contextlib.contextmanager
def refused(*fragments: str) -> Iterator[None]:
    """The block raises ExpertsError with one line that holds all fragments."""
    with pytest.raises(ExpertsError) as caught:
        yield
    text = str(caught.value)
    assert len(text.splitlines()) == 1, text
    assert all(fragment in text for fragment in fragments), text


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@torch.no_grad()
def sampled(folder: Path) -> Tensor:
    """Latents by an Euler loop over roles of this experts folder on the tiny transformer."""
    experts = PhasedExperts.open(folder)
    plan, entries = experts.manifest.plan, experts.manifest.experts
    specs = {e.name: RoleSpec(e.kind, e.rank or 1, e.alpha or 1.0, e.targets) for e in entries}
    roles = Roles(transformer(), WAN, specs)
    for entry in entries:
        read = experts.lora_state if entry.kind == "lora" else experts.tensors
        roles.load_state_dict(entry.name, read(entry.name))
    conditioning = WAN.encode_prompts(wan_pipeline(), [CALL["prompt"]], CALL["max_sequence_length"])
    x = randn(1, *LATENT_SHAPE, seed=7)
    for phase in plan.phases:
        for sigma in phase.sigmas:
            following = [*plan.sigmas, 0.0][plan.sigmas.index(sigma) + 1]
            x = x + (following - sigma) * roles.velocity(phase.name, x, sigma, conditioning)
    return x


# --- merging ----------------------------------------------------------------


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
    assert (manifest.base, manifest.plan, manifest.guidance_scale) == (origin.base, origin.plan, origin.guidance_scale)
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


# --- how weights are stored -------------------------------------------------


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


def rewrite(folder: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change an expert's tensors and give the manifest the new hash."""
    experts = PhasedExperts.open(folder)
    tensors = {key: value.clone() for key, value in experts.tensors(name).items()}
    change(tensors)
    entries = {e.name: e for e in experts.manifest.experts}
    path = folder / entries[name].file
    weights = Weights({k: TensorSpec(v.dtype, tuple(v.shape)) for k, v in tensors.items()}, tensors.__getitem__)
    metadata = read_header(path).metadata
    entries[name] = replace(entries[name], sha256=write_weights(path, weights, metadata))
    manifest = replace(experts.manifest, experts=tuple(entries.values()))
    (folder / MANIFEST_NAME).write_text(manifest.to_json())


def test_write_weights_writes_the_bytes_of_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {
        "b.half": randn(3, 5).to(torch.bfloat16),
        "a.full": randn(2, 2),
        "c.scalar": torch.tensor(2.5),
        "d.empty": torch.zeros(0, 4),
        "e.bool": torch.tensor([True, False, True]),
        "f.whole": torch.arange(3),
        "g.view": randn(4, 6).T,
        "h ünï": randn(1),
    }
    plain = {key: value.contiguous() for key, value in tensors.items()}
    for metadata in ({}, {"key": 'text with "quotes" and ü'}):
        safetensors.torch.save_file(plain, tmp_path / "theirs", metadata=metadata or None)
        specs = {key: TensorSpec(value.dtype, tuple(value.shape)) for key, value in tensors.items()}
        digest = write_weights(tmp_path / "ours", Weights(specs, tensors.__getitem__), metadata)
        assert digest == sha256_of(tmp_path / "ours")
        found, names = safetensors.torch.load_file(tmp_path / "ours"), set(tensors)
        assert set(found) == names and all(torch.equal(found[key], value) for key, value in plain.items())
        with safe_open(tmp_path / "ours", "pt") as file:
            assert (file.metadata() or {}) == metadata
        ours, theirs = (tmp_path / "ours").read_bytes(), (tmp_path / "theirs").read_bytes()
        start, also = (8 + int.from_bytes(data[:8], "little") for data in (ours, theirs))
        assert ours[start:] == theirs[also:] and start % 8 == 0
        assert json.loads(ours[8:start]) == json.loads(theirs[8:also])
    opened = open_weights(tmp_path / "ours")
    assert opened.specs == specs and all(torch.equal(opened.read(key), value) for key, value in plain.items())


def test_every_dtype_that_can_be_read_can_be_written(tmp_path: Path) -> None:
    tensors = {name: torch.ones(3).to(dtype) for name, dtype in DTYPES.items()}
    specs = {name: TensorSpec(value.dtype, (3,)) for name, value in tensors.items()}
    write_weights(tmp_path / "all", Weights(specs, tensors.__getitem__), {})
    opened = open_weights(tmp_path / "all")
    assert opened.specs == specs and all(opened.read(n).dtype == dtype for n, dtype in DTYPES.items())
    assert all(torch.equal(opened.read(name).double(), torch.ones(3).double()) for name in DTYPES)
    found = safetensors.torch.load_file(tmp_path / "all")
    assert all(torch.equal(found[name].double(), torch.ones(3).double()) for name in DTYPES)


def test_weights_are_written_one_at_a_time(tmp_path: Path) -> None:
    made: list[weakref.ref[Tensor]] = []
    most = 0

    def read(name: str) -> Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in made))
        tensor = torch.full((1000,), float(name))
        made.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    specs = {str(i): TensorSpec(torch.float32, (1000,)) for i in range(20)}
    write_weights(tmp_path / "x", Weights(specs, read), {})
    assert len(made) == 20 and most <= 1, "only the tensor that was written last may still be there"


def test_a_file_that_shrinks_while_it_is_read_is_one_line(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(4)}, tmp_path / "x")
    weights = open_weights(tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with refused("became shorter"):
        weights.read("a")
    (tmp_path / "x").unlink()
    with refused("cannot be read"):
        weights.read("a")


# --- extracting -------------------------------------------------------------


def test_merging_then_extracting_at_the_same_rank_gives_the_product_back(
    lora: Path, full: Path, tmp_path: Path
) -> None:
    manifest = conversion(full, tmp_path / "back").to_lora(RANK)
    origin, back = PhasedExperts.open(lora), PhasedExperts.open(tmp_path / "back")
    assert back.manifest == manifest
    for expert in manifest.experts:
        assert (expert.kind, expert.rank, expert.alpha, expert.targets) == ("lora", RANK, RANK, WAN.lora_targets)
        before, after = origin.lora_state(expert.name), back.lora_state(expert.name)
        assert set(before) == set(after)
        for key in (key for key in before if key.endswith("lora_A")):
            up = key.removesuffix("A") + "B"
            expected = ALPHA / RANK * before[up] @ before[key]
            torch.testing.assert_close(after[up] @ after[key], expected, rtol=1e-4, atol=1e-5)
        errors = manifest.training["conversions"][-1]["experts"][expert.name]
        assert errors["relative_error_worst"] < 1e-5
        assert errors["changed_weights_left_out"] == 0
    assert [note["to"] for note in manifest.training["conversions"]] == ["full", "lora"]
    torch.testing.assert_close(sampled(tmp_path / "back"), sampled(lora), rtol=1e-3, atol=1e-4)
    pipeline = wan_pipeline(PhasedDMDScheduler.from_plan(PLAN))
    pipeline.load_lora_weights(tmp_path / "back", weight_name="high_noise.safetensors")
    assert pipeline.get_active_adapters() == ["default_0"]


def test_the_stated_error_is_that_of_the_discarded_singular_values(lora: Path, full: Path, tmp_path: Path) -> None:
    manifest = conversion(full, tmp_path / "small").to_lora(2)
    base = transformer().state_dict()
    for name in (HIGH, LOW):
        expected = {}
        for key, value in PhasedExperts.open(full).tensors(name).items():
            if key.removesuffix(".weight").partition("blocks.")[2].partition(".")[2] in WAN.lora_targets:
                values = torch.linalg.svdvals((value - base[key]).double())
                expected[key.removesuffix(".weight")] = float(values[2:].norm() / values.norm())
        assert len(expected) == 20
        found = manifest.training["conversions"][-1]["experts"][name]
        worst = max(expected, key=lambda key: expected[key])
        assert found["worst_module"] == worst
        assert found["relative_error_worst"] == pytest.approx(expected[worst], rel=1e-4)
        assert found["relative_error_mean"] == pytest.approx(sum(expected.values()) / 20, rel=1e-4)
        assert 0.05 < found["relative_error_mean"] < found["relative_error_worst"] < 1
    assert manifest == read_manifest(tmp_path / "small")


def test_a_lora_folder_gets_another_rank_too(lora: Path, full: Path, tmp_path: Path) -> None:
    conversion(lora, tmp_path / "a").to_lora(2)
    conversion(full, tmp_path / "b").to_lora(2)
    torch.testing.assert_close(sampled(tmp_path / "a"), sampled(tmp_path / "b"), rtol=1e-3, atol=1e-4)


def test_the_error_counts_the_dtype_that_is_stored(full: Path, tmp_path: Path) -> None:
    manifest = conversion(full, tmp_path / "half", dtype=torch.bfloat16).to_lora(RANK)
    for errors in manifest.training["conversions"][-1]["experts"].values():
        assert 1e-3 < errors["relative_error_mean"] < 1e-2
    tensors = PhasedExperts.open(tmp_path / "half").tensors(HIGH)
    assert {v.dtype for k, v in tensors.items() if not k.endswith("alpha")} == {torch.bfloat16}


def test_changed_weights_that_a_lora_cannot_hold_are_stated(full: Path, tmp_path: Path) -> None:
    shutil.copytree(full, tmp_path / "experts")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["proj_out.weight"] *= 1.25
        tensors["blocks.0.norm2.weight"] *= 1.01

    rewrite(tmp_path / "experts", LOW, change)
    found = conversion(tmp_path / "experts", tmp_path / "out").to_lora(RANK).training["conversions"][-1]["experts"]
    assert found[HIGH]["changed_weights_left_out"] == 0
    assert found[LOW]["changed_weights_left_out"] == 2
    assert found[LOW]["largest_change_left_out"] == pytest.approx(0.25, rel=1e-4)


def test_a_module_that_did_not_change_has_no_error(base: Path) -> None:
    own = open_weights(base / "transformer" / "diffusion_pytorch_model.safetensors")
    found = extract(own, own, WAN.lora_targets, 2, torch.float32, "x")
    assert set(found.errors.values()) == {0.0} and not found.left_out
    assert all(torch.isfinite(value).all() for value in found.lora.values())


@pytest.mark.parametrize("shape", [(1100, 1200), (1200, 1100)])
def test_large_matrices_are_factorised_as_well_as_by_the_full_svd(shape: tuple[int, int]) -> None:
    assert min(shape) > EXACT_SIZE
    matrix = randn(shape[0], 6, seed=1) @ randn(6, shape[1], seed=2)
    state = torch.random.get_rng_state()
    down, up = factorise(matrix, 6)
    assert (down.shape, up.shape) == ((6, shape[1]), (shape[0], 6))
    assert (up @ down - matrix).norm() / matrix.norm() < 1e-5
    noisy = matrix + 0.05 * randn(*shape, seed=3)
    down, up = factorise(noisy, 6)
    best = torch.linalg.svdvals(noisy)[6:].norm()
    assert (up @ down - noisy).norm() / best < 1.001
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers stay"


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
    plain = DiffusionPipeline.from_pretrained(out)
    assert type(plain) is WanPipeline, "loads without this package"
    scheduler = PhasedDMDScheduler.from_pretrained(out, subfolder="scheduler")
    pipeline = DiffusionPipeline.from_pretrained(out, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    assert PLAN.phases[0].sigmas[-1] > pipeline.config.boundary_ratio > PLAN.phases[1].sigmas[0]
    torch.testing.assert_close(pipeline_latents(pipeline, 4), sampled(lora), rtol=1e-4, atol=1e-5)
    index = json.loads((out / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert code
    variables: dict[str, Any] = {}
    exec(code[1], variables)  # noqa: S102 - the code that users are told to run
    assert isinstance(variables["pipe"].scheduler, PhasedDMDScheduler)


def test_one_expert_is_a_stock_pipeline_of_one_network(base: Path, tmp_path: Path) -> None:
    plan = PhasePlan.from_steps([3], shift=5.0)
    experts = write_lora_folder(tmp_path / "experts", base, plan)
    conversion(experts, tmp_path / "stock").to_diffusers()
    scheduler = PhasedDMDScheduler.from_plan(plan)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "stock", scheduler=scheduler)
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


# --- what a user can get wrong ----------------------------------------------


TARGETS: dict[str, Callable[[Conversion], object]] = {
    "full": lambda c: c.to_full(),
    "lora": lambda c: c.to_lora(2),
    "comfyui": lambda c: c.to_comfyui(),
    "diffusers": lambda c: c.to_diffusers(),
}


@pytest.fixture(params=list(TARGETS))
def target(request: pytest.FixtureRequest) -> Callable[[Conversion], object]:
    return TARGETS[request.param]


def test_an_existing_output_is_replaced_only_when_asked(
    lora: Path, tmp_path: Path, target: Callable[[Conversion], object]
) -> None:
    out = tmp_path / "deep" / "out"
    target(conversion(lora, out))
    first = content(out)
    with refused("exists", "--overwrite"):
        target(conversion(lora, out))
    assert content(out) == first
    weights = next(path for path in out.rglob("*.safetensors") if "vae" not in str(path))
    weights.write_bytes(b"old")
    target(conversion(lora, out, overwrite=True))
    assert content(out) == first
    assert {path.name for path in out.parent.iterdir()} == {"out"}


def test_overwrite_leaves_foreign_folders_and_files_alone(lora: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    (tmp_path / "file").write_bytes(b"text")
    for name in ("photos", "file"):
        with refused("not a folder of experts", "leaves it alone"):
            conversion(lora, tmp_path / name, overwrite=True).to_full()
    assert (tmp_path / "photos" / "cat.png").exists() and (tmp_path / "file").exists()


@pytest.mark.parametrize("where", [".", "..", "inside"])
def test_what_is_read_is_never_written_into(lora: Path, base: Path, tmp_path: Path, where: str) -> None:
    shutil.copytree(lora, tmp_path / "parent" / "experts")
    folder = tmp_path / "parent" / "experts"
    before = content(tmp_path)
    with refused("which is read", "choose another folder"):
        conversion(folder, folder / where, overwrite=True).to_full()
    with refused("which is read", str(base)):
        conversion(folder, base / where, overwrite=True).to_full()
    assert content(tmp_path) == before


@pytest.mark.parametrize("moment", ["first write", "last write", "rename"])
def test_a_full_disk_leaves_everything_as_it_was(
    lora: Path,
    tmp_path: Path,
    target: Callable[[Conversion], object],
    moment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    conversion(lora, out).to_full()
    before = content(out)
    full_disk = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    rename = Path.rename

    def no_rename(self: Path, to: Path) -> Path:
        if to == out and self.name == "new":
            raise full_disk
        return rename(self, to)

    def no_space(*args: Any, **kwargs: Any) -> Any:
        raise full_disk

    if moment == "rename":
        monkeypatch.setattr(Path, "rename", no_rename)
    elif moment == "first write":
        for name in ("write_weights", "write_experts"):
            monkeypatch.setattr(convert_module, name, no_space)
    else:
        monkeypatch.setattr(Path, "write_text", no_space)
        monkeypatch.setattr(convert_module, "_save_scheduler", no_space)
        write = convert_module.write_weights
        calls = [2]

        def second_fails(path: Path, *args: Any) -> str:
            calls[0] -= 1
            if calls[0] == 0:
                path.write_bytes(b"half")
                raise full_disk
            return write(path, *args)

        monkeypatch.setattr(convert_module, "write_weights", second_fails)
    with refused(f"cannot write {out}", "No space left", "nothing was changed: make room"):
        target(conversion(lora, out, overwrite=True))
    assert content(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_too_small_a_disk_is_noticed_before_the_work(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    need = sum(e.stat().st_size for e in full.glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, need // 2))
    monkeypatch.setattr(convert_module, "write_weights", lambda *args: pytest.fail("work was begun"))
    with refused("takes 183.6 kB", "kB are free", "make room"):
        conversion(full, tmp_path / "out").to_full()
    assert not (tmp_path / "out").exists()


def test_an_interrupt_leaves_nothing_behind(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "write_weights", interrupt)
    with pytest.raises(KeyboardInterrupt):
        conversion(lora, tmp_path / "out").to_full()
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("name", ["nowhere/at/all", "../nowhere", "-"])
def test_a_base_that_is_nowhere_is_one_line(lora: Path, tmp_path: Path, name: str) -> None:
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

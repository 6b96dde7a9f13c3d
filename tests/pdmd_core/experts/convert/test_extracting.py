from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor

from pdmd_core.experts import (
    PhasedExperts,
    read_manifest,
)
from pdmd_core.experts.convert.low_rank import EXACT_SIZE, extract, factorise
from pdmd_core.experts.format.weights import open_weights
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.conversions import (
    ALPHA,
    HIGH,
    LOW,
    PLAN,
    RANK,
    WAN,
    conversion,
    refused,
    rewrite,
    sampled,
)
from tests.helpers.families.wan import wan_image_two_networks, wan_two_networks
from tests.helpers.tiny import randn, transformer, wan_pipeline
from tests.helpers.tiny_pipelines import lora_experts


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
        lower = [
            float(torch.linalg.svdvals((value - base[key]).double())[1:].norm() / (value - base[key]).double().norm())
            for key, value in PhasedExperts.open(full).tensors(name).items()
            if key.removesuffix(".weight") in expected
        ]
        assert found["relative_error_by_rank"] == {"1": pytest.approx(sum(lower) / 20, rel=1e-4)}
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


@pytest.fixture
def two_networks(tmp_path: Path) -> tuple[Path, Path]:
    """A pipeline whose second network is the first with other matrices, and full experts of both."""
    pipe = wan_two_networks()
    state = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    for index, key in enumerate(state):
        if key.removesuffix(".weight").endswith(tuple(WAN.modules)):
            state[key] += 0.1 * randn(*state[key].shape, seed=index)
    pipe.transformer_2.load_state_dict(state)
    pipe.save_pretrained(tmp_path / "two")
    merged = lora_experts(tmp_path / "lora", pipe, PLAN, ["transformer", "transformer_2"])
    conversion(merged, tmp_path / "full", base=str(tmp_path / "two")).to_full()
    return tmp_path / "two", tmp_path / "full"


def same_weights(first: Path, second: Path) -> None:
    for expert in (HIGH, LOW):
        found, expected = (PhasedExperts.open(folder).tensors(expert) for folder in (first, second))
        assert set(found) == set(expected)
        for key in found:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)


def test_all_experts_become_loras_of_one_network(two_networks: tuple[Path, Path], tmp_path: Path) -> None:
    base, full = two_networks
    manifest = conversion(full, tmp_path / "one", base=str(base)).to_lora(24, network="transformer")
    assert {entry.component for entry in manifest.experts} == {"transformer"}
    note = manifest.training["conversions"][-1]
    assert note["networks"] == ["transformer"]
    for errors in note["experts"].values():
        assert errors["relative_error_worst"] < 1e-4 and errors["changed_weights_left_out"] == 0
        lower = list(errors["relative_error_by_rank"].values())
        assert lower == sorted(lower, reverse=True) and 0.2 < lower[0] < 1
    conversion(tmp_path / "one", tmp_path / "again", base=str(base)).to_full()
    same_weights(tmp_path / "again", full)


def test_experts_become_loras_of_another_base(two_networks: tuple[Path, Path], tmp_path: Path) -> None:
    base, full = two_networks
    other = WanPipeline.from_pretrained(base)
    for name in ("transformer", "transformer_2"):
        state = {key: value.clone() for key, value in getattr(other, name).state_dict().items()}
        state["blocks.0.attn1.to_q.weight"] += 0.3 * randn(*state["blocks.0.attn1.to_q.weight"].shape, seed=5)
        getattr(other, name).load_state_dict(state)
    other.save_pretrained(tmp_path / "other")
    manifest = conversion(full, tmp_path / "of_other", base=str(base)).to_lora(24, relative_to=str(tmp_path / "other"))
    assert manifest.base.model == str(tmp_path / "other") and manifest.base.revision is None
    assert [entry.component for entry in manifest.experts] == ["transformer", "transformer_2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # fingerprints are those of the other base
        conversion(tmp_path / "of_other", tmp_path / "again").to_full()
    same_weights(tmp_path / "again", full)


def test_what_experts_cannot_be_relative_to_is_one_line(
    two_networks: tuple[Path, Path], full: Path, tmp_path: Path
) -> None:
    with refused("transformer_9 has no readable config.json"):
        conversion(two_networks[1], tmp_path / "out", base=str(two_networks[0])).to_lora(2, network="transformer_9")
    wan_image_two_networks().save_pretrained(tmp_path / "image")
    with refused("patch_embedding.weight", "give its own base"):
        conversion(full, tmp_path / "out").to_lora(2, relative_to=str(tmp_path / "image"))
    with refused("neither a folder nor a Hub model", "give another --relative-to"):
        conversion(full, tmp_path / "out").to_lora(2, relative_to=str(tmp_path / "none"))
    assert not (tmp_path / "out").exists()


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
    down, up, values = factorise(matrix, 6)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix)[:6], rtol=1e-4, atol=1e-3)
    assert (down.shape, up.shape) == ((6, shape[1]), (shape[0], 6))
    assert (up @ down - matrix).norm() / matrix.norm() < 1e-5
    noisy = matrix + 0.05 * randn(*shape, seed=3)
    down, up, _ = factorise(noisy, 6)
    best = torch.linalg.svdvals(noisy)[6:].norm()
    assert (up @ down - noisy).norm() / best < 1.001
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers stay"

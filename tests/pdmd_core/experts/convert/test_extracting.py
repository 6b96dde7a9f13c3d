from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
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
    rewrite,
    sampled,
)
from tests.helpers.tiny import randn, transformer, wan_pipeline


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

"""Experts folders as they are written and read back, also where writing fails."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from pdmd_core.experts import (
    MANIFEST_NAME,
    BaseModel,
    Expert,
    Manifest,
    PhasedExperts,
    lora_from_file,
    lora_to_file,
    read_manifest,
    write_experts,
)
from pdmd_core.experts import writing as writing_module
from pdmd_core.experts.format.files import check_scheduler
from pdmd_core.roles import Roles, RoleSpec
from tests.helpers.experts_folder import ALPHA, MODULE, PLAN, RANK, WAN, refused, rewrite
from tests.helpers.tiny import lora_roles, randomise, transformer, write_lora_experts


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- writing ----------------------------------------------------------------


def test_a_written_folder_is_read_back_exactly(folder: Path, roles: Roles) -> None:
    experts = PhasedExperts.open(folder)
    assert experts.manifest.plan == PLAN
    for expert in experts.manifest.experts:
        expected, found = roles.state_dict(expert.name), experts.lora_state(expert.name)
        assert set(found) == set(expected)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        assert (expert.rank, expert.alpha, expert.targets) == (RANK, ALPHA, WAN.lora_targets)


def test_a_written_folder_holds_the_manifest_and_one_file_for_each_expert(folder: Path) -> None:
    assert names_in(folder) == {MANIFEST_NAME, "high_noise.safetensors", "low_noise.safetensors"}
    for expert in read_manifest(folder).experts:
        assert expert.sha256 == hashlib.sha256((folder / expert.file).read_bytes()).hexdigest()


def test_write_experts_returns_the_manifest_it_wrote(tmp_path: Path, roles: Roles) -> None:
    written = write_lora_experts(tmp_path / "a" / "b", PLAN, roles, training={"updates": 3})
    assert written == read_manifest(tmp_path / "a" / "b")
    assert written.training == {"updates": 3} and all(expert.sha256 for expert in written.experts)


def test_equal_experts_are_equal_files(tmp_path: Path, roles: Roles) -> None:
    for name in ("first", "second"):
        write_lora_experts(tmp_path / name, PLAN, roles)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


def test_keys_of_a_lora_file_are_exactly_the_ones_every_tool_reads(folder: Path) -> None:
    native = [f"{attention}.{x}" for attention in ("self_attn", "cross_attn") for x in "qkvo"] + ["ffn.0", "ffn.2"]
    expected = {
        f"diffusion_model.blocks.{block}.{module}.{part}"
        for block in (0, 1)
        for module in native
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    for expert in read_manifest(folder).experts:
        tensors = safetensors.torch.load_file(folder / expert.file)
        assert set(tensors) == expected
        for key, value in tensors.items():
            if key.endswith(".alpha"):
                assert value.shape == () and value == ALPHA
            else:
                assert value.shape[0 if "lora_down" in key else 1] == RANK


def test_each_file_carries_the_manifest_without_hashes(folder: Path) -> None:
    manifest = read_manifest(folder)
    for expert in manifest.experts:
        with safe_open(folder / expert.file, "pt") as file:
            carried = json.loads(file.metadata()["phased_experts"])
        assert carried["expert"] == expert.name
        expected = replace(manifest, experts=tuple(replace(e, sha256="0" * 64) for e in manifest.experts))
        assert Manifest.from_dict(carried["manifest"]) == expected


def test_full_experts_are_written_and_read_back(tmp_path: Path) -> None:
    networks = {phase.name: transformer(seed=seed).state_dict() for seed, phase in enumerate(PLAN.phases)}
    entries = tuple(Expert(name, f"{name}.safetensors", "full", "") for name in networks)
    write_experts(tmp_path, Manifest(BaseModel("tiny/wan", WAN.architecture, "wan"), PLAN, entries), networks)
    experts = PhasedExperts.open(tmp_path)
    for name, expected in networks.items():
        found = experts.tensors(name)
        assert set(found) == set(expected) and all(torch.equal(found[k], v) for k, v in expected.items())
        with refused(f"{name!r} is a full expert", "no LoRA weights"):
            experts.lora_state(name)


def test_written_files_have_the_rights_that_the_user_gives_new_files(tmp_path: Path, roles: Roles) -> None:
    before = os.umask(0o027)
    try:
        write_lora_experts(tmp_path / "experts", PLAN, roles)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "experts").iterdir()} == {0o640}


def test_an_expert_without_weights_is_one_line_and_nothing_is_written(folder: Path, roles: Roles) -> None:
    weights = {"high_noise": lora_to_file(roles.state_dict("high_noise"), ALPHA, WAN)}
    manifest = read_manifest(folder)
    for given, found in ((weights, "high_noise"), ({}, "none")):
        with refused(f"no weights of {'low_noise' if given else 'high_noise, low_noise'}", f"found those of {found}"):
            write_experts(folder.parent / "new", manifest, given)
    assert not (folder.parent / "new").exists()


def test_values_that_are_not_finite_are_not_written(folder: Path, roles: Roles) -> None:
    weights = {name: lora_to_file(roles.state_dict(name), ALPHA, WAN) for name in ("high_noise", "low_noise")}
    weights["low_noise"][f"{MODULE}.lora_up.weight"] = torch.full((24, RANK), float("nan"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with refused("low_noise", f"{MODULE}.lora_up.weight has values that are not finite"):
        write_experts(folder, read_manifest(folder), weights)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_manifest_that_could_not_be_read_back_is_not_written(folder: Path, roles: Roles) -> None:
    weights = {name: lora_to_file(roles.state_dict(name), ALPHA, WAN) for name in ("high_noise", "low_noise")}
    manifest = read_manifest(folder)
    wrong = replace(manifest, experts=(manifest.experts[0], replace(manifest.experts[1], alpha=-1.0)))
    with refused("experts[1].alpha is a positive number, found -1.0"):
        write_experts(folder.parent / "new", wrong, weights)
    assert not (folder.parent / "new").exists()


def test_lora_from_file_inverts_lora_to_file_for_any_targets() -> None:
    roles = Roles(transformer(), WAN, {"high": RoleSpec("lora", 3, 0.5, ("ffn.net.0.proj", "attn2.to_out.0"))})
    randomise(roles, "high", seed=5)
    state = roles.state_dict("high")
    tensors = lora_to_file(state, 0.5, WAN)
    entry = Expert(
        "high", "high.safetensors", "lora", "", rank=3, alpha=0.5, targets=("ffn.net.0.proj", "attn2.to_out.0")
    )
    found = lora_from_file(tensors, entry, WAN)
    assert set(found) == set(state) and all(torch.equal(found[key], value) for key, value in state.items())


def test_half_precision_files_keep_their_alpha(folder: Path, roles: Roles) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: value.to(torch.bfloat16) for key, value in tensors.items()})

    state = rewrite(folder, "low_noise", halve).lora_state("low_noise")
    expected = roles.state_dict("low_noise")
    assert all(torch.equal(state[key], value.to(torch.bfloat16)) for key, value in expected.items())


# --- a failure while writing ------------------------------------------------


def fail_at(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The disk is full: in the second expert's file, half written, or in the manifest, half written."""
    write_weights, write_text = writing_module.write_weights, Path.write_text

    def half_a_file(path: Path, *arguments: Any) -> str:
        digest = write_weights(path, *arguments)
        if "low_noise" in path.name:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            raise OSError(28, "No space left on device")
        return digest

    def half_a_text(self: Path, data: str, **arguments: Any) -> int:
        write_text(self, data[: len(data) // 2], **arguments)
        raise OSError(28, "No space left on device")

    if where == "expert":
        monkeypatch.setattr(writing_module, "write_weights", half_a_file)
    else:
        monkeypatch.setattr(Path, "write_text", half_a_text)


@pytest.mark.parametrize("where", ["expert", "manifest"])
def test_nothing_stays_of_a_first_write_that_fails(
    tmp_path: Path, roles: Roles, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    fail_at(monkeypatch, where)
    with pytest.raises(OSError, match="No space left"):
        write_lora_experts(tmp_path, PLAN, roles)
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("where", ["expert", "manifest"])
def test_an_overwrite_that_fails_leaves_the_old_experts_usable(
    folder: Path, roles: Roles, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    fail_at(monkeypatch, where)
    with pytest.raises(OSError, match="No space left"):
        write_lora_experts(folder, PLAN, lora_roles(PLAN, RANK, alpha=1.0))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    PhasedExperts.open(folder).lora_state("low_noise")


def test_experts_can_be_written_again_over_old_ones(folder: Path) -> None:
    write_lora_experts(folder, PLAN, lora_roles(PLAN, rank=2, alpha=1.0))
    experts = PhasedExperts.open(folder)
    assert experts.manifest.experts[0].rank == 2 and experts.lora_state("high_noise")


def test_experts_are_saved_as_a_folder_that_opens(tmp_path: Path) -> None:
    shipped = PhasedExperts.open(Path(__file__).parents[4] / "training" / "embedded" / "models" / "experts")
    shipped.save_pretrained(tmp_path / "saved")
    again = PhasedExperts.from_pretrained(tmp_path / "saved")
    assert again.manifest == shipped.manifest
    check_scheduler(again.folder, again.manifest)
    again.save_pretrained(tmp_path / "saved")
    assert all(again.verify(expert.name).is_file() for expert in again.manifest.experts)


def test_a_manifest_that_cannot_be_written_leaves_the_one_that_is_there(folder: Path) -> None:
    before = (folder / MANIFEST_NAME).read_bytes()
    (folder / f".{MANIFEST_NAME}.part").mkdir()  # nothing can be written here
    with pytest.raises(OSError, match="directory"):
        PhasedExperts.open(folder).at_strength(0.5).save_pretrained(folder)
    assert (folder / MANIFEST_NAME).read_bytes() == before

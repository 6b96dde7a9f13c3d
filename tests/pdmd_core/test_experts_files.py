from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from torch import Tensor

from pdmd_core.experts import (
    MANIFEST_NAME,
    BaseModel,
    Expert,
    ExpertsError,
    Manifest,
    PhasedExperts,
    lora_from_file,
    lora_to_file,
    read_manifest,
    write_experts,
)
from pdmd_core.experts import weights as weights_module
from pdmd_core.experts.weights import open_weights
from pdmd_core.families import family
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import Roles, RoleSpec
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.tiny import (
    CALL,
    LATENT_SHAPE,
    lora_roles,
    randn,
    randomise,
    transformer,
    wan_pipeline,
    write_lora_experts,
)

PLAN = PhasePlan.from_steps([2, 2], shift=5.0)
WAN = family("wan")
RANK, ALPHA = 4, 6.0
MODULE = "diffusion_model.blocks.1.cross_attn.k"


@pytest.fixture(scope="module")
def roles() -> Roles:
    return lora_roles(PLAN, RANK, ALPHA)


@pytest.fixture
def folder(tmp_path: Path, roles: Roles) -> Path:
    """A valid experts folder."""
    write_lora_experts(tmp_path / "experts", PLAN, roles)
    return tmp_path / "experts"


def one_line(error: BaseException) -> str:
    assert len(str(error).splitlines()) == 1, str(error)
    return str(error)


@contextlib.contextmanager
def refused(*fragments: str) -> Iterator[None]:
    """The block raises ExpertsError with one line that holds all fragments."""
    with pytest.raises(ExpertsError) as caught:
        yield
    text = one_line(caught.value)
    assert all(fragment in text for fragment in fragments), text


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def rewrite(folder: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> PhasedExperts:
    """Change the tensors of one expert's file and give the manifest the hash of the new file."""
    manifest = read_manifest(folder)
    path = folder / manifest.expert(name).file
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    accept(folder, name)
    return PhasedExperts.open(folder)


def accept(folder: Path, name: str, **changes: Any) -> None:
    """Give the manifest the hash that an expert's file has now."""
    manifest = read_manifest(folder)
    digest = hashlib.sha256((folder / manifest.expert(name).file).read_bytes()).hexdigest()
    experts = [replace(e, sha256=digest, **changes) if e.name == name else e for e in manifest.experts]
    (folder / MANIFEST_NAME).write_text(replace(manifest, experts=tuple(experts)).to_json())


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


# --- a failure while writing ------------------------------------------------


def fail_at(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The disk is full: in the second expert's file, half written, or in the manifest, half written."""
    write_weights, write_text = weights_module.write_weights, Path.write_text

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
        monkeypatch.setattr(weights_module, "write_weights", half_a_file)
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


# --- opening ----------------------------------------------------------------


def test_open_takes_a_text_path_and_a_linked_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    for path in (str(folder), tmp_path / "link"):
        assert PhasedExperts.open(path).tensors("high_noise")


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "low_noise.safetensors").unlink()
    with refused("low_noise.safetensors", "is missing", "download it again"):
        PhasedExperts.open(folder)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors"])
def test_a_manifest_cannot_point_outside_its_folder(folder: Path, file: str) -> None:
    (folder / "sub").mkdir()
    for path in (folder.parent / "x.safetensors", folder / "sub" / "x.safetensors"):
        path.write_bytes((folder / "low_noise.safetensors").read_bytes())
    data = json.loads((folder / MANIFEST_NAME).read_text())
    data["experts"][1]["file"] = file
    (folder / MANIFEST_NAME).write_text(json.dumps(data))
    with refused("plain file name", repr(file)):
        PhasedExperts.open(folder)


def test_a_link_that_leaves_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    path = folder / "low_noise.safetensors"
    path.rename(tmp_path / "elsewhere.safetensors")
    for target in (tmp_path / "elsewhere.safetensors", Path("..") / "elsewhere.safetensors"):
        path.symlink_to(target)
        with refused("low_noise.safetensors", "a link that leaves the folder"):
            PhasedExperts.open(folder)
        path.unlink()


def test_a_manifest_and_a_folder_that_are_links_out_of_it_are_not_followed(folder: Path, tmp_path: Path) -> None:
    (folder / MANIFEST_NAME).rename(tmp_path / "elsewhere.json")
    (folder / MANIFEST_NAME).symlink_to(tmp_path / "elsewhere.json")
    with refused(MANIFEST_NAME, "a link that leaves the folder"):
        PhasedExperts.open(folder)
    (folder / MANIFEST_NAME).unlink()
    (folder / MANIFEST_NAME).symlink_to(MANIFEST_NAME)
    with refused(f"no {MANIFEST_NAME} here"):
        PhasedExperts.open(folder)


def test_what_is_no_file_is_refused_and_not_waited_for(folder: Path) -> None:
    (folder / "low_noise.safetensors").unlink()
    os.mkfifo(folder / "low_noise.safetensors")
    with refused("low_noise.safetensors", "is missing"):
        PhasedExperts.open(folder)
    with refused("a safetensors file is expected here, found something else"):
        open_weights(folder / "low_noise.safetensors")


def test_a_link_within_the_folder_is_followed(folder: Path) -> None:
    (folder / "weights").mkdir()
    path = folder / "low_noise.safetensors"
    path.rename(folder / "weights" / "low.safetensors")
    path.symlink_to(Path("weights") / "low.safetensors")
    assert PhasedExperts.open(folder).tensors("low_noise")


def as_hub_download(folder: Path, cache: Path) -> Path:
    """The folder as the Hub's client keeps it: snapshots/<revision>/<file> are links to blobs/<hash>."""
    repository = cache / "models--tiny--experts"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in folder.iterdir():
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    return snapshot


def test_the_hub_s_download_cache_is_followed_also_when_the_cache_is_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    snapshot = as_hub_download(folder, tmp_path / "disk")
    for path in (snapshot, tmp_path / "cache" / snapshot.relative_to(tmp_path / "disk")):
        assert PhasedExperts.open(path).tensors("low_noise")


def test_a_snapshot_cannot_link_to_the_blobs_of_another_repository(folder: Path, tmp_path: Path) -> None:
    snapshot = as_hub_download(folder, tmp_path / "cache")
    other = tmp_path / "cache" / "models--other" / "blobs" / "secret"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"secret")
    (snapshot / "low_noise.safetensors").unlink()
    (snapshot / "low_noise.safetensors").symlink_to(other)
    with refused("a link that leaves the folder"):
        PhasedExperts.open(snapshot)


# --- damaged and foreign weights --------------------------------------------


def test_more_than_the_memory_holds_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: Any, **options: Any) -> Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")

    experts = PhasedExperts.open(folder)
    monkeypatch.setattr(torch, "empty", no_memory)
    with refused("low_noise.safetensors", "bytes, more than there is memory for"):
        experts.tensors("low_noise")


def cut(content: bytes) -> bytes:
    return content[:-1]


def flip(content: bytes) -> bytes:
    return content[:-7] + bytes([content[-7] ^ 1]) + content[-6:]


def empty(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_file_is_refused_by_its_hash(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / "low_noise.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    experts = PhasedExperts.open(folder)
    with refused(str(path), "sha256 is", experts.manifest.experts[1].sha256[:12], "download it again"):
        experts.lora_state("low_noise")
    assert experts.lora_state("high_noise"), "the other expert is whole"


def test_swapped_files_are_refused_by_their_hashes(folder: Path) -> None:
    high, low = folder / "high_noise.safetensors", folder / "low_noise.safetensors"
    high.rename(folder / "x")
    low.rename(high)
    (folder / "x").rename(low)
    for name in ("high_noise", "low_noise"):
        with refused("sha256"):
            PhasedExperts.open(folder).tensors(name)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95pickle",
        (2**60).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (20).to_bytes(8, "little") + b'{"x":{"dtype":"F32"}',
        (56).to_bytes(8, "little") + b'{"x":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}  ' + bytes(4),
        (56).to_bytes(8, "little") + b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}  ' + bytes(4),
        (56).to_bytes(8, "little") + b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  ' + bytes(2),
    ],
    ids=["empty", "pickle", "huge-header", "list-header", "open-header", "unknown-dtype", "wrong-size", "short"],
)
def test_a_file_that_is_no_safetensors_is_refused_even_with_the_right_hash(folder: Path, content: bytes) -> None:
    (folder / "low_noise.safetensors").write_bytes(content)
    accept(folder, "low_noise")
    with refused("low_noise.safetensors", "not a readable safetensors file"):
        PhasedExperts.open(folder).tensors("low_noise")


def test_a_file_of_another_rank_than_the_manifest_s_is_refused(folder: Path) -> None:
    accept(folder, "low_noise", rank=RANK + 1)
    with refused("low_noise.safetensors", f"expected rank {RANK + 1}", "lora_"):
        PhasedExperts.open(folder).lora_state("low_noise")


@pytest.mark.parametrize("alpha", [ALPHA + 0.5, float(RANK), 1.0])
def test_a_file_of_another_alpha_than_the_manifest_s_is_refused(folder: Path, alpha: float) -> None:
    accept(folder, "low_noise", alpha=alpha)
    with refused("low_noise.safetensors", f"is not the manifest's alpha {alpha}"):
        PhasedExperts.open(folder).lora_state("low_noise")


@pytest.mark.parametrize(
    "alpha", [float("nan"), float("inf"), 0.0, -ALPHA, [ALPHA, ALPHA]], ids=["nan", "inf", "zero", "negative", "two"]
)
def test_one_odd_alpha_among_the_modules_is_refused(folder: Path, alpha: float | list[float]) -> None:
    experts = rewrite(folder, "low_noise", lambda t: t.update({f"{MODULE}.alpha": torch.tensor(alpha)}))
    with refused(f"{MODULE}.alpha", "is not the manifest's alpha"):
        experts.lora_state("low_noise")


def test_half_precision_files_keep_their_alpha(folder: Path, roles: Roles) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: value.to(torch.bfloat16) for key, value in tensors.items()})

    state = rewrite(folder, "low_noise", halve).lora_state("low_noise")
    expected = roles.state_dict("low_noise")
    assert all(torch.equal(state[key], value.to(torch.bfloat16)) for key, value in expected.items())


@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((RANK + 1, 24), "lora_down"),
        ((24, RANK + 1), "lora_up"),
        ((RANK,), "lora_down"),
        ((), "lora_down"),
        ((RANK, 24, 1, 1), "lora_down"),
    ],
)
def test_a_weight_of_a_shape_that_is_no_lora_s_is_refused(folder: Path, shape: tuple[int, ...], part: str) -> None:
    key = f"{MODULE}.{part}.weight"
    experts = rewrite(folder, "low_noise", lambda t: t.update({key: torch.zeros(shape)}))
    with refused(key, str(shape), f"expected rank {RANK}"):
        experts.lora_state("low_noise")


def test_weights_of_another_width_do_not_fit_the_network_and_are_named(folder: Path) -> None:
    key = f"{MODULE}.lora_down.weight"
    experts = rewrite(folder, "low_noise", lambda t: t.update({key: torch.zeros(RANK, 25)}))
    state = experts.lora_state("low_noise")
    target = lora_roles(PLAN, RANK, ALPHA)
    with pytest.raises(ValueError, match=re.escape("blocks.1.attn2.to_k.lora_A of shape (4, 24), found (4, 25)")):
        target.load_state_dict("low_noise", state)


@pytest.mark.parametrize("part", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_a_module_without_one_of_its_three_parts_is_refused(folder: Path, part: str) -> None:
    experts = rewrite(folder, "low_noise", lambda t: t.pop(f"{MODULE}.{part}"))
    with refused("low_noise.safetensors", "every adapted module needs lora_down, lora_up and alpha"):
        experts.lora_state("low_noise")


@pytest.mark.parametrize("part", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_what_would_be_scaled_wrongly_is_refused_without_a_family_too(folder: Path, part: str) -> None:
    """ComfyUI and diffusers take the tensors as they are: without alpha they would be scaled by 1."""
    with refused("every adapted module needs lora_down, lora_up and alpha, 19 of 20 modules have them"):
        rewrite(folder, "low_noise", lambda t: t.pop(f"{MODULE}.{part}")).tensors("low_noise")
    accept(folder, "high_noise", alpha=ALPHA / 2)
    with refused("high_noise.safetensors", f"is not the manifest's alpha {ALPHA / 2}"):
        PhasedExperts.open(folder).tensors("high_noise")
    accept(folder, "high_noise", alpha=ALPHA, rank=RANK + 1)
    with refused("high_noise.safetensors", f"expected rank {RANK + 1}"):
        PhasedExperts.open(folder).tensors("high_noise")


def test_a_file_that_adapts_other_modules_than_the_manifest_s_targets_is_refused(folder: Path) -> None:
    accept(folder, "low_noise", targets=WAN.lora_targets[1:])
    with refused("low_noise.safetensors", f"adapts blocks.0.{WAN.lora_targets[0]}", "none of the manifest's targets"):
        PhasedExperts.open(folder).lora_state("low_noise")
    accept(folder, "low_noise", targets=(*WAN.lora_targets, "attn1.norm_q"))
    with refused("low_noise.safetensors", "adapts nothing for the manifest's target 'attn1.norm_q'", "is missing"):
        PhasedExperts.open(folder).lora_state("low_noise")
    accept(folder, "low_noise", targets=("_q", *WAN.lora_targets))
    with refused("adapts nothing for the manifest's target '_q'"):
        PhasedExperts.open(folder).lora_state("low_noise")


def test_a_file_without_any_weights_is_refused(folder: Path) -> None:
    experts = rewrite(folder, "low_noise", lambda t: t.clear())
    with refused("every adapted module needs"):
        experts.lora_state("low_noise")


@pytest.mark.parametrize(
    "key",
    [
        "transformer.blocks.0.attn1.to_q.lora_A.weight",
        "blocks.0.self_attn.q.lora_down.weight",
        "lora_unet_blocks_0_self_attn_q.lora_down.weight",
        f"{MODULE}.lora_A.weight",
        f"{MODULE}.diff",
        f"{MODULE}.alpha.weight",
    ],
)
def test_a_key_of_another_format_is_named(folder: Path, key: str) -> None:
    experts = rewrite(folder, "low_noise", lambda t: t.update({key: torch.zeros(RANK, 24)}))
    with refused("low_noise.safetensors", repr(key), "diffusion_model.<module>.lora_down|lora_up.weight or .alpha"):
        experts.lora_state("low_noise")


def test_a_module_that_wan_does_not_have_is_named(folder: Path) -> None:
    gate = lora_to_file({"blocks.0.attn1.to_q.lora_A": torch.zeros(RANK, 24)}, ALPHA, WAN)
    gate |= lora_to_file({"blocks.0.attn1.to_q.lora_B": torch.zeros(24, RANK)}, ALPHA, WAN)
    gate = {key.replace("self_attn.q", "self_attn.gate"): value for key, value in gate.items()}
    experts = rewrite(folder, "low_noise", lambda t: t.update(gate))
    with refused("low_noise.safetensors", "'blocks.0.self_attn.gate'"):
        experts.lora_state("low_noise")


def test_an_unknown_family_is_an_error_that_lists_the_known(folder: Path) -> None:
    data = json.loads((folder / MANIFEST_NAME).read_text())
    data["base"]["family"] = "sora"
    (folder / MANIFEST_NAME).write_text(json.dumps(data))
    with refused(str(folder), "'sora'", "expected one of: ", "wan"):
        PhasedExperts.open(folder).lora_state("low_noise")


def test_an_unknown_expert_is_an_error_that_lists_the_known(folder: Path) -> None:
    with refused("'middle'", "high_noise, low_noise"):
        PhasedExperts.open(folder).tensors("middle")


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


# --- stock diffusers with an experts folder ---------------------------------


@torch.no_grad()
def loop_over_roles(folder: Path, pipeline: WanPipeline, noise: Tensor, order: int = 1) -> Tensor:
    """Euler by hand with the folder's experts as roles; ``order`` -1 asks them in the wrong order."""
    experts = PhasedExperts.open(folder)
    plan, entries = experts.manifest.plan, experts.manifest.experts
    specs = {e.name: RoleSpec("lora", e.rank or 0, e.alpha or 0.0, e.targets) for e in entries}
    roles = Roles(transformer(), WAN, specs)
    for entry in entries:
        roles.load_state_dict(entry.name, experts.lora_state(entry.name))
    conditioning = WAN.encode_prompts(pipeline, [CALL["prompt"]], CALL["max_sequence_length"])
    x = noise
    for phase, entry in zip(plan.phases, entries[::order], strict=True):
        for sigma in phase.sigmas:
            following = [*plan.sigmas, 0.0][plan.sigmas.index(sigma) + 1]
            x = x + (following - sigma) * roles.velocity(entry.name, x, sigma, conditioning)
    return x


@pytest.mark.parametrize("steps", [[3], [2, 2], [1, 1, 2]])
def test_a_stock_pipeline_with_the_lora_files_equals_a_loop_over_roles(tmp_path: Path, steps: list[int]) -> None:
    plan = PhasePlan.from_steps(steps, shift=5.0)
    write_lora_experts(tmp_path, plan, lora_roles(plan, rank=RANK, alpha=ALPHA))
    pipeline = wan_pipeline(PhasedDMDScheduler.from_plan(plan))
    names = [phase.name for phase in plan.phases]
    for name in names:
        pipeline.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)

    def use_expert_of_next_step(pipe: WanPipeline, step: int, timestep: Tensor, tensors: dict[str, Any]) -> Any:
        pipe.set_adapters(names[pipe.scheduler.phase])
        return tensors

    def run() -> Tensor:
        pipeline.set_adapters(names[0])
        return pipeline(
            **CALL,
            num_inference_steps=len(plan.sigmas),
            guidance_scale=1.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(7),
            callback_on_step_end=use_expert_of_next_step,
        ).frames

    noise = randn(1, *LATENT_SHAPE, seed=7)
    expected = loop_over_roles(tmp_path, pipeline, noise)
    for _ in range(2):
        torch.testing.assert_close(run(), expected, rtol=1e-5, atol=1e-5)
    if len(plan) > 1:
        assert (loop_over_roles(tmp_path, pipeline, noise, order=-1) - expected).abs().max() > 0.01
    pipeline.unload_lora_weights()
    teacher = pipeline(
        **CALL,
        num_inference_steps=len(plan.sigmas),
        guidance_scale=1.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(7),
    ).frames
    assert (teacher - expected).abs().max() > 0.01

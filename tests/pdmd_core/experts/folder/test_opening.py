"""What is opened of an experts folder: plain files, links that stay inside, known experts of a known family."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from pdmd_core.experts import MANIFEST_NAME, BaseModel, Expert, Manifest, PhasedExperts, write_experts
from pdmd_core.experts.format.weights import open_weights
from tests.helpers.experts_folder import PLAN, refused


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


def test_an_unknown_family_is_an_error_that_lists_the_known(folder: Path) -> None:
    data = json.loads((folder / MANIFEST_NAME).read_text())
    data["base"]["family"] = "sora"
    (folder / MANIFEST_NAME).write_text(json.dumps(data))
    with refused(str(folder), "'sora'", "expected one of: ", "wan"):
        PhasedExperts.open(folder).lora_state("low_noise")


def test_an_unknown_expert_is_an_error_that_lists_the_known(folder: Path) -> None:
    with refused("'middle'", "high_noise, low_noise"):
        PhasedExperts.open(folder).tensors("middle")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_each_file_is_read_once_and_mapped_then(kind: str, tmp_path: Path, hashed: list[str]) -> None:
    """Counted by the system: a file that is mapped is not read into memory of its own."""
    counter, size = Path("/proc/self/io"), 4 * 2**20
    if not counter.exists():
        pytest.skip("Linux counts what a process reads")

    def read() -> int:
        return int(counter.read_text().split("rchar:")[1].split()[0])

    rank = {"rank": 4, "alpha": 4.0, "targets": ("k",)} if kind == "lora" else {}
    entries = tuple(Expert(p.name, f"{p.name}.safetensors", kind, "", **rank) for p in PLAN.phases)  # type: ignore[arg-type]
    weights = {entry.name: {"w": torch.full((size // 4,), float(k))} for k, entry in enumerate(entries)}
    base = BaseModel("some/base", "Unknown", "unknown")
    write_experts(tmp_path, Manifest(base, PLAN, entries, 1.0, {}), weights)
    experts, before = PhasedExperts.open(tmp_path), read()
    for _ in range(2):
        for entry in entries:
            experts.verify(entry.name)
            assert torch.equal(experts.tensors(entry.name)["w"], weights[entry.name]["w"])
    assert hashed == [entry.file for entry in entries]
    assert 2 * size <= read() - before < 2.1 * size

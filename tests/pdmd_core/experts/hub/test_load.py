"""Loading experts with the unmodified Hub client over HTTP, with and without faults."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from pdmd_core.experts import MANIFEST_NAME, ExpertsError, PhasedExperts, read_manifest
from tests.helpers.hub import READER, WRITER, Hub
from tests.helpers.hub_client import Client
from tests.helpers.pushed_experts import FILES, HIGH, PLAN, done, flip, load, push, refusal
from tests.helpers.tiny import save_wan_pipeline


def test_experts_are_loaded_from_the_hub_and_nothing_else_is(
    hub: Hub, client: Client, written: Path, stored: str, tmp_path: Path
) -> None:
    found = Path(done(load(client, stored, tmp_path)))
    assert {path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()} == FILES
    assert all((found / name).read_bytes() == (written / name).read_bytes() for name in FILES)
    assert hub.asked("^GET .*/resolve/")[0].endswith(MANIFEST_NAME)
    hub.requests.clear()
    assert done(load(client, stored, tmp_path)) == str(found)
    assert not hub.asked("^GET .*/resolve/"), "all of it is in the cache"


def test_pushed_experts_come_back_equal(hub: Hub, client: Client, folder: Path, repo: str, tmp_path: Path) -> None:
    done(push(client, folder, repo))
    found = Path(done(load(client, repo, tmp_path / "cache")))
    assert read_manifest(found) == read_manifest(folder)


def test_a_revision_is_a_branch_or_a_commit(
    hub: Hub, client: Client, written: Path, stored: str, tmp_path: Path
) -> None:
    first = hub.repositories[stored].branches["main"]
    hub.repositories[stored].branches["trial/two"] = first
    hub.put(stored, {"README.md": b"emptied"})
    refusal(load(client, stored, tmp_path), f"no {MANIFEST_NAME}")
    for revision in ("trial/two", first):
        assert Path(done(load(client, stored, tmp_path, revision=revision))).name == first
    refusal(load(client, stored, tmp_path, revision="v9"), stored, "no revision 'v9'")


def test_private_experts_need_a_token_that_may_see_them(
    hub: Hub, client: Client, anonymous: Client, stored: str, tmp_path: Path
) -> None:
    hub.repositories[stored].private = True
    done(load(client, stored, tmp_path / "1"))
    done(load(anonymous, stored, tmp_path / "2", token=WRITER))
    refusal(load(anonymous, stored, tmp_path / "3"), "private", "hf auth login")
    refusal(load(anonymous, stored, tmp_path / "4", token=READER), "private")
    refusal(load(anonymous, stored, tmp_path / "5", token="hf_wrong"), "refuses the token")


def test_a_repository_without_experts_is_told_from_one_that_is_not_there(
    hub: Hub, client: Client, repo: str, tmp_path: Path
) -> None:
    refusal(load(client, repo, tmp_path), repo, "no such repository")
    hub.put(repo, {"model.safetensors": b"x"})
    refusal(load(client, repo, tmp_path), repo, f"holds no {MANIFEST_NAME}")


def change_manifest(hub: Hub, repo: str, written: Path, **changes: Any) -> None:
    data = json.loads((written / MANIFEST_NAME).read_text())
    data["experts"][0].update(changes)
    hub.put(repo, {**hub.files(repo), MANIFEST_NAME: json.dumps(data).encode()})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"file": "../../secret.safetensors"}, ["plain file name"]),
        ({"file": "other.safetensors"}, ["lacks other.safetensors"]),
        ({"sha256": "0" * 64}, [HIGH, "its manifest says 000000000000...", "broken"]),
        ({"kind": "secret"}, ["lora or full"]),
    ],
    ids=["path", "missing", "hash", "kind"],
)
def test_a_manifest_is_checked_before_any_weight_is_downloaded(
    hub: Hub, client: Client, written: Path, stored: str, tmp_path: Path, changes: dict[str, str], words: list[str]
) -> None:
    change_manifest(hub, stored, written, **changes)
    refusal(load(client, stored, tmp_path), *words)
    assert not hub.asked("GET .*safetensors")


def test_sizes_are_bounded_before_anything_is_downloaded(hub: Hub, client: Client, stored: str, tmp_path: Path) -> None:
    before = (
        "from pdmd_core.experts.hub import download as hub\nsaved = dict(hub.MAX_EXPERT_BYTES)\n"
        "hub.MAX_EXPERT_BYTES['lora'] = 99"
    )
    refusal(load(client, stored, tmp_path, before), "high_noise.safetensors has", "at most 99")
    assert not hub.asked("GET .*safetensors")
    client.run("from pdmd_core.experts.hub import download as hub\nhub.MAX_EXPERT_BYTES['lora'] = 16 * 2**30")
    done(load(client, stored, tmp_path))
    hub.put(stored, {**hub.files(stored), MANIFEST_NAME: b" " * (4 * 2**20 + 1)})
    hub.requests.clear()
    refusal(load(client, stored, tmp_path), MANIFEST_NAME, "at most 4194304")
    assert not hub.asked("GET")


# --- load: server and network fail ------------------------------------------------------------


@pytest.mark.parametrize(
    "faults",
    [
        {"pattern": f"GET .*{HIGH}", "kind": "cut", "value": 1000},
        {"pattern": f"GET .*{MANIFEST_NAME}", "kind": "cut", "value": 10},
        {"pattern": f"GET .*{HIGH}", "kind": "drop"},
        {"pattern": f"GET .*{HIGH}", "value": 503, "body": b"<html>down</html>"},
        {"pattern": f"HEAD .*{HIGH}", "value": 500},
        {"pattern": "/paths-info/", "value": 500, "times": 3},
        {"pattern": f"GET .*{HIGH}", "kind": "stall", "value": 100},
        {"pattern": "/paths-info/", "kind": "stall", "value": 100},
        {"pattern": f"GET .*{HIGH}", "kind": "flip"},
    ],
    ids=lambda faults: "-".join(str(faults.get(key, "")) for key in ("pattern", "kind", "value")),
)
def test_a_load_goes_on_after_a_failure_that_passes(
    hub: Hub, client: Client, written: Path, stored: str, tmp_path: Path, faults: dict[str, Any]
) -> None:
    hub.fail(**faults)
    start = time.monotonic()
    found = Path(done(load(client, stored, tmp_path)))
    assert time.monotonic() - start < 90, "a server that is silent is not waited for"
    assert all(fault.times == 0 for fault in hub.faults), "the fault happened"
    assert all((found / name).read_bytes() == (written / name).read_bytes() for name in FILES)


def test_a_download_that_is_always_cut_off_is_one_line(hub: Hub, client: Client, stored: str, tmp_path: Path) -> None:
    hub.fail(f"GET .*{HIGH}", "cut", 0, times=10_000)
    refusal(load(client, stored, tmp_path), stored, "RemoteProtocolError", "try again")
    assert len(hub.asked(f"GET .*{HIGH}")) < 50
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_file_that_always_arrives_damaged_is_one_line(hub: Hub, client: Client, stored: str, tmp_path: Path) -> None:
    hub.fail(f"GET .*{HIGH}", "flip", times=10_000)
    refusal(load(client, stored, tmp_path), HIGH, "sha256", "download it again")
    assert len(hub.asked(f"GET .*{HIGH}")) == 2


def test_a_file_that_was_damaged_in_the_cache_is_downloaded_again(
    hub: Hub, client: Client, stored: str, tmp_path: Path
) -> None:
    found = Path(done(load(client, stored, tmp_path)))
    flip((found / HIGH).resolve())
    refusal(load(client, stored, tmp_path, local_files_only=True), HIGH, "sha256")
    done(load(client, stored, tmp_path))


def test_offline_the_cache_is_enough(hub: Hub, client: Client, stored: str, tmp_path: Path) -> None:
    refusal(load(client, stored, tmp_path / "cache", local_files_only=True), "in the cache", "with a connection")
    found = done(load(client, stored, tmp_path / "cache"))
    hub.requests.clear()
    assert done(load(client, stored, tmp_path / "cache", local_files_only=True)) == found
    with Client(hub.url, tmp_path, HF_HUB_OFFLINE="1") as offline:
        assert done(load(offline, stored, tmp_path / "cache")) == found
        refusal(load(offline, stored, tmp_path / "cache", revision="v9"), "at v9", "in the cache")
        refusal(load(offline, "user/unseen", tmp_path / "cache"), "user/unseen", "in the cache")
    assert not hub.requests
    next(Path(found).glob("low_noise*")).unlink()
    refusal(load(client, stored, tmp_path / "cache", local_files_only=True), "wholly")


def test_without_a_connection_a_copy_in_the_cache_is_used_and_said(
    hub: Hub, client: Client, stored: str, tmp_path: Path
) -> None:
    found = done(load(client, stored, tmp_path / "cache"))
    hub.fail(".", times=10_000)
    outcome = load(client, stored, tmp_path / "cache")
    assert done(outcome) == found and "using the copy in the cache" in outcome.said
    with Client("http://127.0.0.1:9", tmp_path) as cut_off:
        assert done(load(cut_off, stored, tmp_path / "cache")) == found
        refusal(load(cut_off, stored, tmp_path / "empty"), "no usable answer", "ConnectError")


# --- folders ------------------------------------------------------------


def test_a_folder_goes_before_a_repository_of_the_same_name(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(written, tmp_path / "user" / "experts")
    assert PhasedExperts.from_pretrained("user/experts").manifest.plan == PLAN
    assert PhasedExperts.from_pretrained(tmp_path / "user" / "experts").lora_state("low_noise")
    with pytest.raises(ExpertsError, match="a folder here, which has no revision 'v1'"):
        PhasedExperts.from_pretrained("user/experts", revision="v1")


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "./experts", "", "/no/such/folder", Path("user/experts")])
def test_what_is_neither_a_folder_nor_an_id_is_one_line(
    name: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExpertsError, match="is neither a folder nor a Hub id") as error:
        PhasedExperts.from_pretrained(name)
    assert len(str(error.value).splitlines()) == 1


def test_blobs_that_repositories_share_are_followed_and_no_other_link(written: Path, tmp_path: Path) -> None:
    """The layout that the client makes of files from Xet storage."""
    cache = tmp_path / "cache"
    repository = cache / "models--user--experts"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name in (MANIFEST_NAME, HIGH, "low_noise.safetensors"):
        digest = hashlib.sha256(name.encode()).hexdigest()
        (cache / "blobs" / digest[:2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(written / name, cache / "blobs" / digest[:2] / digest)
        (repository / "blobs" / f"etag-{name}").symlink_to(Path("..") / ".." / "blobs" / digest[:2] / digest)
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / f"etag-{name}")
    assert PhasedExperts.open(snapshot).tensors("high_noise")
    blob = repository / "blobs" / f"etag-{HIGH}"
    blob.unlink()
    blob.symlink_to(written / HIGH)
    with pytest.raises(ExpertsError, match="a link that leaves the folder"):
        PhasedExperts.open(snapshot)


def test_converting_takes_its_base_from_the_hub(client: Client, hub: Hub, folder: Path, tmp_path: Path) -> None:
    """The same files as with the base in a folder; of weights, only those of the network are downloaded."""
    base = save_wan_pipeline(tmp_path / "base")
    hub.put("user/base", {p.relative_to(base).as_posix(): p.read_bytes() for p in base.rglob("*") if p.is_file()})
    outputs = []
    for name in (str(base), "user/base"):
        outputs.append(tmp_path / f"converted-{len(outputs)}")
        arguments = ["convert", str(folder), "--to", "full", "--base", name, "--output", str(outputs[-1])]
        outcome = client.run(f"from pdmd_core.experts.__main__ import main\nassert main({arguments}) == 0")
        assert outcome.error is None, outcome.error
    for expert in read_manifest(folder).experts:
        local, from_hub = ((output / expert.file).read_bytes() for output in outputs)
        assert local == from_hub
    loaded = [path for path in hub.asked("/user/base/resolve/") if path.endswith((".safetensors", ".bin"))]
    assert loaded and all("/transformer/" in path for path in loaded)

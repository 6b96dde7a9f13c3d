"""Pushing and loading experts with the unmodified Hub client over HTTP, with and without faults."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdmd_core.experts import MANIFEST_NAME, ExpertsError, PhasedExperts, read_manifest
from pdmd_core.phases import PhasePlan
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.hub import READER, WRITER, Hub
from tests.hub_client import Client, Outcome
from tests.tiny import lora_roles, save_wan_pipeline, write_lora_experts

PLAN = PhasePlan.from_steps([2, 2], shift=5.0)
FILES = {MANIFEST_NAME, "high_noise.safetensors", "low_noise.safetensors", "scheduler/scheduler_config.json"}
HIGH = "high_noise.safetensors"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(autouse=True)
def no_faults(hub: Hub) -> Iterator[None]:
    hub.requests.clear()
    yield
    hub.faults.clear()


@pytest.fixture(scope="module")
def client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """With the token of ``user``."""
    with Client(hub.url, tmp_path_factory.mktemp("home")) as client:
        yield client


@pytest.fixture(scope="module")
def anonymous(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Without a token."""
    with Client(hub.url, tmp_path_factory.mktemp("home"), token=None) as client:
        yield client


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    write_lora_experts(folder, PLAN, lora_roles(PLAN), training={"updates": 3})
    PhasedDMDScheduler.from_plan(PLAN).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """Experts that a test may change."""
    shutil.copytree(written, tmp_path / "experts")
    return tmp_path / "experts"


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """A repository of this test's own."""
    return f"user/{hashlib.sha1(request.node.nodeid.encode()).hexdigest()[:12]}"


@pytest.fixture
def stored(hub: Hub, repo: str, written: Path) -> str:
    """The repository with experts in it, as another client may have put them there."""
    paths = [path for path in written.rglob("*") if path.is_file()]
    content = {path.relative_to(written).as_posix(): path.read_bytes() for path in paths}
    hub.put(repo, {**content, "README.md": b"# card", "large.safetensors": b"not of the manifest"})
    return repo


def push(client: Client, folder: Path, repo: str, **arguments: Any) -> Outcome:
    return client.run(
        "from pdmd_core.experts.hub import push_experts\n"
        f"result = push_experts({str(folder)!r}, {repo!r}, **{arguments!r})"
    )


def load(client: Client, repo: str, cache: Path, before: str = "", **arguments: Any) -> Outcome:
    """``result`` is the folder; all tensors were read."""
    return client.run(
        f"from pdmd_core.experts import PhasedExperts\n{before}\n"
        f"experts = PhasedExperts.from_pretrained({repo!r}, cache_dir={str(cache)!r}, **{arguments!r})\n"
        "tensors = [experts.tensors(e.name) for e in experts.manifest.experts]\n"
        "result = str(experts.folder)"
    )


def done(outcome: Outcome) -> str:
    assert outcome.error is None, f"{outcome.kind}: {outcome.error}\n{outcome.said}"
    return str(outcome.result)


def refusal(outcome: Outcome, *fragments: str) -> str:
    """The text of an ExpertsError: one line that holds all fragments."""
    assert outcome.kind == "ExpertsError", outcome
    text = str(outcome.error)
    assert len(text.splitlines()) == 1 and len(text) < 600, text
    assert all(fragment in text for fragment in fragments), text
    return text


# --- push ------------------------------------------------------------


def test_a_push_is_one_commit_with_the_experts_and_a_card_that_loads_them_from_there(
    hub: Hub, client: Client, folder: Path, repo: str
) -> None:
    url = done(push(client, folder, repo, commit_message="My experts"))
    assert url == f"{hub.url}/{repo}"
    files = hub.files(repo)
    assert set(files) == {*FILES, ".gitattributes", "README.md"}
    assert all(files[name] == (folder / name).read_bytes() for name in FILES)
    assert f'load_phased_pipeline("{repo}")' in files["README.md"].decode()
    assert hub.repositories[repo].messages == ["initial commit", "My experts"]
    assert not hub.repositories[repo].private


def test_private_is_kept_and_refused_for_a_repository_that_is_public(
    hub: Hub, client: Client, folder: Path, repo: str
) -> None:
    done(push(client, folder, repo, private=True))
    assert hub.repositories[repo].private
    public = hub.put(f"{repo}-public", {"x": b"x"})
    refusal(push(client, folder, f"{repo}-public", private=True), "exists and is public", "make it private")
    assert list(hub.repositories[f"{repo}-public"].commits) == [public]


def test_samples_report_and_licence_are_pushed_and_what_is_left_is_named(
    hub: Hub, client: Client, folder: Path, repo: str
) -> None:
    rows = [{"method": "experts", "network_evaluations": 4, "frechet": 0.1, "seconds": 1.0}]
    (folder / "report.json").write_text(json.dumps({"features": "FD", "rows": rows}))
    (folder / "LICENSE").write_text("terms")
    (folder / "samples").mkdir()
    for name in ("samples/a.png", "samples/b.gif", "samples/c.mp4", "samples/a.txt", "state.pt", ".high.part"):
        (folder / name).write_bytes(b"content of " + name.encode())
    outcome = push(client, folder, repo)
    done(outcome)
    more = {"report.json", "LICENSE", "samples/a.png", "samples/b.gif", "samples/c.mp4", "samples/a.txt"}
    assert set(hub.files(repo)) == {*FILES, *more, ".gitattributes", "README.md"}
    card = hub.files(repo)["README.md"].decode()
    assert "samples/a.png" in card and "| experts | 4 | 0.1 | 1.0 |" in card
    assert "not pushed: state.pt" in outcome.said and ".high.part" not in outcome.said


def test_a_card_of_one_s_own_is_kept_and_a_generated_one_is_written_anew(
    hub: Hub, client: Client, folder: Path, repo: str
) -> None:
    (folder / "README.md").write_text("---\ntags: [mine]\n---\n\nMy own words.\n")
    done(push(client, folder, repo))
    assert hub.files(repo)["README.md"].decode().endswith("My own words.\n")
    client.run(
        "from pathlib import Path\nfrom pdmd_core.experts import read_manifest\n"
        "from pdmd_core.experts.card import write_card\n"
        f"write_card(Path({str(folder)!r}), read_manifest(Path({str(folder)!r})))"
    )
    assert str(folder) in (folder / "README.md").read_text()
    done(push(client, folder, repo))
    assert str(folder) not in hub.files(repo)["README.md"].decode()


def test_pushing_again_sends_only_what_changed(hub: Hub, client: Client, folder: Path, repo: str) -> None:
    done(push(client, folder, repo))
    assert len(hub.asked("PUT")) <= 2, "equal files of other tests are there already"
    hub.requests.clear()
    done(push(client, folder, repo))
    assert not hub.asked("PUT") and not hub.asked("/commit/")
    write_lora_experts(folder, PLAN, lora_roles(PLAN, alpha=2.5))
    hub.requests.clear()
    done(push(client, folder, repo))
    assert len(hub.asked("PUT")) == 2 and len(hub.asked("/commit/")) == 1
    assert hub.files(repo)[HIGH] == (folder / HIGH).read_bytes()


def test_a_branch_is_made_for_a_revision_and_main_stays(hub: Hub, client: Client, folder: Path, repo: str) -> None:
    url = done(push(client, folder, repo, revision="trial/two"))
    assert url == f"{hub.url}/{repo}/tree/trial/two"
    assert set(hub.files(repo)) == {".gitattributes"}
    assert set(hub.files(repo, "trial/two")) >= FILES
    done(push(client, folder, repo, revision="trial/two"))


def test_the_licence_is_that_of_the_base_s_own_card(hub: Hub, client: Client, folder: Path, repo: str) -> None:
    card = b"---\nlicense: other\nlicense_name: big-lab\nlicense_link: TERMS.md\n---\n"
    hub.put("tiny/wan", {"README.md": card})
    try:
        done(push(client, folder, repo))
    finally:
        del hub.repositories["tiny/wan"]
    text = hub.files(repo)["README.md"].decode()
    assert "license: other\n" in text and "license_name: big-lab\n" in text
    assert f"license_link: {hub.url}/tiny/wan/blob/main/TERMS.md\n" in text


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def twice_the_plan(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().rstrip().rstrip("}") + ', "plan": {}}')


def link_the_scheduler(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.rename(folder.parent / "elsewhere.json")
    path.symlink_to(folder.parent / "elsewhere.json")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: flip(folder / HIGH), [HIGH, "sha256"]),
        (lambda folder: (folder / HIGH).unlink(), [HIGH, "is missing"]),
        (lambda folder: (folder / MANIFEST_NAME).unlink(), [f"no {MANIFEST_NAME}"]),
        (lambda folder: (folder / MANIFEST_NAME).write_text("{}"), ["format_version"]),
        (
            lambda folder: shutil.rmtree(folder / "scheduler"),
            ["scheduler_config.json: no such file", "save_pretrained"],
        ),
        (lambda folder: (folder / "scheduler" / "scheduler_config.json").write_text("{"), ["not JSON"]),
        (twice_the_plan, ["the key 'plan' is there twice"]),
        (lambda folder: (folder / "scheduler" / "scheduler_config.json").write_text(" " * 5_000_000), ["bytes"]),
        (link_the_scheduler, ["a link that leaves the folder is not followed"]),
        (
            lambda folder: PhasedDMDScheduler.from_plan(PhasePlan.from_steps([2, 2], 3.0)).save_pretrained(
                folder / "scheduler"
            ),
            ["its plan is not the manifest's"],
        ),
        (lambda folder: (folder / "report.json").write_text('{"rows": [{}]}'), ["report.json", "method"]),
        (lambda folder: shutil.rmtree(folder), ["no such folder"]),
    ],
    ids=["hash", "file", "none", "format", "scheduler", "json", "twice", "large", "link", "plan", "report", "folder"],
)
def test_a_broken_folder_is_not_pushed(
    hub: Hub, client: Client, folder: Path, repo: str, damage: Any, words: list[str]
) -> None:
    damage(folder)
    refusal(push(client, folder, repo), *words)
    assert not hub.requests


# --- push: server and network fail ------------------------------------------------------------


@pytest.mark.parametrize(
    "faults",
    [
        {"pattern": "/commit/", "times": 2},
        {"pattern": "/commit/", "value": 503, "body": b"<html>down</html>"},
        {"pattern": "PUT /lfs/"},
        {"pattern": "PUT /lfs/", "kind": "drop"},
        {"pattern": "/commit/", "kind": "drop"},
        {"pattern": "/validate-yaml", "value": 503, "body": b"<html>down</html>"},
        {"pattern": "/repos/create", "value": 502},
        {"pattern": "/preupload/", "value": 504},
        {"pattern": "/commit/", "kind": "stall", "value": 100},
        {"pattern": "PUT /lfs/", "kind": "stall", "value": 100},
    ],
    ids=lambda faults: "-".join(str(faults.get(key, "")) for key in ("pattern", "kind", "value")),
)
def test_a_push_goes_on_after_a_failure_that_passes(
    hub: Hub, client: Client, folder: Path, repo: str, faults: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "objects", {})
    hub.fail(**faults)
    start = time.monotonic()
    outcome = push(client, folder, repo, timeout=2.0)
    done(outcome)
    assert time.monotonic() - start < 90, "a server that is silent is not waited for"
    assert all(fault.times == 0 for fault in hub.faults), "the fault happened"
    assert hub.repositories[repo].messages == ["initial commit", "Phased experts"]
    assert all(hub.files(repo)[name] == (folder / name).read_bytes() for name in FILES)
    if faults["pattern"] == "/commit/":
        assert "uploading: " in outcome.said and "attempt 2 of 4 follows in 1 s" in outcome.said


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub: Hub, client: Client, folder: Path, repo: str) -> None:
    hub.fail("/commit/", "lose")
    done(push(client, folder, repo))
    assert hub.repositories[repo].messages == ["initial commit", "Phased experts"]


def test_a_push_that_failed_for_good_says_so_and_goes_on_where_it_was(
    hub: Hub, client: Client, folder: Path, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "objects", {})
    hub.fail("/commit/", times=100)
    refusal(push(client, folder, repo), str(folder), repo, "answers 500", "try again later")
    assert len(hub.asked("/commit/")) == 4
    assert len(hub.asked("PUT")) == 2
    hub.faults.clear()
    hub.requests.clear()
    done(push(client, folder, repo))
    assert not hub.asked("PUT"), "the weights were there already"


def test_who_may_not_push_is_told_why(hub: Hub, client: Client, anonymous: Client, folder: Path, repo: str) -> None:
    refusal(push(client, folder, repo, token="hf_wrong"), "refuses the token (401)", "hf auth login")
    refusal(push(client, folder, repo, token=READER), "403", "write access")
    assert len(hub.asked("/repos/create")) == 2, "a refusal is not asked for again"
    assert repo not in hub.repositories
    hub.requests.clear()
    refusal(push(anonymous, folder, repo), "no token", "hf auth login", "HF_TOKEN")
    for name in ("user/two words", "a/b/c", "", "user/../x", "-user/x"):
        refusal(push(client, folder, name), "user/name", repr(name))
    assert not hub.requests


def test_no_network_is_one_line(folder: Path, tmp_path: Path, repo: str) -> None:
    with Client("http://127.0.0.1:9", tmp_path) as client:
        refusal(push(client, folder, repo), "no usable answer from http://127.0.0.1:9", "ConnectError", "connection")
    with Client("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1") as client:
        refusal(push(client, folder, repo), "offline mode is on", "HF_HUB_OFFLINE")


def test_what_can_be_known_before_there_is_anything_to_push(hub: Hub, client: Client, anonymous: Client) -> None:
    def check(client: Client, repo: str, token: str | None = None) -> Outcome:
        return client.run(f"from pdmd_core.experts.hub import check_push\ncheck_push({repo!r}, {token!r})")

    assert check(client, "user/x") == Outcome(None, None, None, "")
    refusal(check(client, "user/x y"), "user/name")
    refusal(check(client, "user/x", "hf_wrong"), "refuses the token")
    refusal(check(anonymous, "user/x"), "no token")
    hub.fail("whoami", value=503)
    outcome = check(client, "user/x")
    assert outcome.error is None and "will be tried all the same" in outcome.said


# --- load ------------------------------------------------------------


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
    before = "from pdmd_core.experts import hub\nsaved = dict(hub.MAX_EXPERT_BYTES)\nhub.MAX_EXPERT_BYTES['lora'] = 99"
    refusal(load(client, stored, tmp_path, before), "high_noise.safetensors has", "at most 99")
    assert not hub.asked("GET .*safetensors")
    client.run("from pdmd_core.experts import hub\nhub.MAX_EXPERT_BYTES['lora'] = 16 * 2**30")
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

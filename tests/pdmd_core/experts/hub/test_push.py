"""Pushing experts with the unmodified Hub client over HTTP, with and without faults."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from pdmd_core.experts import MANIFEST_NAME
from pdmd_core.phases import PhasePlan
from pdmd_core.scheduler import PhasedDMDScheduler
from tests.helpers.hub import READER, Hub
from tests.helpers.hub_client import ROOT, Client, Outcome
from tests.helpers.pushed_experts import FILES, HIGH, PLAN, done, flip, push, refusal
from tests.helpers.tiny import lora_roles, write_lora_experts


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
        "from pdmd_core.experts.hub.card import write_card\n"
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


def test_the_example_of_the_docstring_runs(hub: Hub, client: Client) -> None:
    outcome = client.run(
        "import contextlib, doctest\nfrom pdmd_core.experts.hub import push\n"
        f"with contextlib.chdir({str(ROOT)!r}):\n    result = list(doctest.testmod(push))"
    )
    assert outcome.error is None and outcome.result == [0, 2], outcome.said
    assert MANIFEST_NAME in hub.files("user/my-experts")

"""What people paste: experts in a folder of a repository, LoRA files of others, a gated base."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdmd_core.experts import MANIFEST_NAME, ExpertsError
from pdmd_core.experts.hub.ids import HubAddress, hub_address
from pdmd_core.experts.hub.lora_files import local_lora_file
from tests.helpers.hub import Hub
from tests.helpers.hub_client import Client
from tests.helpers.pushed_experts import FILES, HIGH, done, load, refusal

GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted"}


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("user/name", HubAddress("user/name")),
        ("https://huggingface.co/user/name", HubAddress("user/name")),
        ("https://huggingface.co/user/name/", HubAddress("user/name")),
        ("https://huggingface.co/user/name/tree/main", HubAddress("user/name", "", "main")),
        ("https://huggingface.co/user/name/tree/v1/a/b", HubAddress("user/name", "a/b", "v1")),
        ("https://hf.co/user/name/blob/main/a%20b.safetensors", HubAddress("user/name", "a b.safetensors", "main")),
        (
            "https://huggingface.co/user/name/resolve/refs%2Fpr%2F1/x.safetensors?download=true",
            HubAddress("user/name", "x.safetensors", "refs/pr/1"),
        ),
        (" hf://user/name@v1/x.safetensors\n", HubAddress("user/name", "x.safetensors", "v1")),
        ("user/name/a/x.safetensors", HubAddress("user/name", "a/x.safetensors")),
    ],
)
def test_what_people_paste_is_read(text: str, address: HubAddress) -> None:
    assert hub_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "/user/name",
        "./user/name",
        "https://example.com/user/name",
        "https://huggingface.co/user",
        "https://huggingface.co/user/name/discussions/3",
        "https://huggingface.co/datasets/user/name/blob/main/x.safetensors",
        "user/name/../x.safetensors",
        "hf://user/name/a/../../x.safetensors",
        "user/na me",
    ],
)
def test_what_is_no_place_on_the_hub_is_none(text: str) -> None:
    assert hub_address(text) is None


def test_experts_in_a_folder_of_a_repository(
    hub: Hub, client: Client, written: Path, repo: str, tmp_path: Path
) -> None:
    paths = [path for path in written.rglob("*") if path.is_file()]
    files = {f"a/b/{path.relative_to(written).as_posix()}": path.read_bytes() for path in paths}
    sha = hub.put(repo, {**files, "README.md": b"# card", "other/x.safetensors": b"not of the manifest"})
    cache = tmp_path / "cache"
    found = Path(done(load(client, repo, cache, subfolder="a/b")))
    assert {path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()} == FILES
    assert found.parts[-3:] == (sha, "a", "b") and (found / HIGH).read_bytes() == (written / HIGH).read_bytes()
    assert not hub.asked("other/x.safetensors"), "nothing else is downloaded"
    for text in (
        f"{hub.url}/{repo}/tree/main/a/b",
        f"{hub.url}/{repo}/blob/main/a/b/{MANIFEST_NAME}",
        f"hf://{repo}/a/b",
    ):
        assert done(load(client, text, cache)) == str(found)
    assert done(load(client, repo, cache, subfolder="a/b", local_files_only=True)) == str(found)
    refusal(load(client, repo, cache), repo, f"holds no {MANIFEST_NAME}: there are no phased experts there")
    refusal(load(client, repo, cache, subfolder="c"), f"holds no {MANIFEST_NAME} in c")
    refusal(load(client, f"{hub.url}/{repo}/tree/main/a/b", cache, revision="v2"), "says revision main, revision= v2")


def lora(client: Client, given: str) -> object:
    return client.run(
        f"from pdmd_core.experts.hub.lora_files import local_lora_file\nresult = str(local_lora_file({given!r}))"
    )


def test_a_lora_file_of_the_hub_by_its_address(hub: Hub, client: Client, repo: str) -> None:
    hub.put(repo, {"sub/x.safetensors": b"weights"})
    for text in (
        f"{hub.url}/{repo}/blob/main/sub/x.safetensors",
        f"{repo}/sub/x.safetensors",
        f"hf://{repo}/sub/x.safetensors",
    ):
        assert Path(done(lora(client, text))).read_bytes() == b"weights"
    refusal(lora(client, f"{repo}/none.safetensors"), repo, "has no file 'none.safetensors'")
    refusal(lora(client, f"{hub.url}/{repo}"), "the address of a .safetensors file on the Hub is expected here")
    refusal(lora(client, f"{hub.url}/{repo}/blob/v9/sub/x.safetensors"), "no revision 'v9'")
    hub.fail("resolve/.*y.safetensors", value=403, times=9, headers=GATED)
    hub.put(repo, {"y.safetensors": b"other weights"})
    refusal(lora(client, f"{repo}/y.safetensors"), "it is gated: accept its conditions on its page, then run `hf auth")


def test_a_gated_base_says_accept_and_log_in(hub: Hub, client: Client, repo: str) -> None:
    hub.put(repo, {"model_index.json": b"{}"})
    hub.fail("resolve/.*model_index.json", value=403, times=99, headers=GATED)
    load_base = (
        "from pdmd_core.experts import Manifest, PhasedExperts\nfrom pdmd_core.pipelines import load_phased_pipeline\n"
        "from tests.helpers.manifests import VALID\nfrom pathlib import Path\n"
        "plan = {'phases': VALID['plan']['phases'][:1]}\n"
        "manifest = Manifest.from_dict({**VALID, 'plan': plan, 'experts': VALID['experts'][:1]})\n"
        f"load_phased_pipeline(PhasedExperts(Path('.'), manifest), base={repo!r}, revision='main')"
    )
    find_base = (
        "from pdmd_core.experts.base_files import BaseFiles\nfrom pdmd_core.experts import BaseModel\n"
        f"BaseFiles.find(BaseModel({repo!r}, 'WanTransformer3DModel', 'wan'), None, networks=False)"
    )
    for code in (load_base, find_base):
        refusal(client.run(code), repo, "it is gated: accept its conditions on its page, then run `hf auth login`")


def test_a_file_here_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("user/name/x.safetensors")
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    assert local_lora_file("user/name/x.safetensors") == file
    assert local_lora_file(Path("user/name/none.safetensors")) == Path("user/name/none.safetensors")
    assert local_lora_file("none.safetensors") == Path("none.safetensors")
    with pytest.raises(ExpertsError, match="is expected here, such as"):
        local_lora_file("https://example.com/x.safetensors")

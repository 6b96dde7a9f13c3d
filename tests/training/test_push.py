"""``distill.py --push_to_hub`` against a hub on loopback."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.hub import WRITER, Hub
from tests.helpers.hub_client import Client, Outcome

REPO = "user/experts"


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub) -> Hub:
    """Without repositories and faults."""
    for kept in (server.repositories, server.faults, server.requests):
        kept.clear()
    return server


@pytest.fixture(scope="module")
def client(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Client(server.url, tmp_path_factory.mktemp("home"), token=None) as client:
        yield client


@pytest.fixture
def config_file(settings_of_run: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**settings_of_run, "updates": 1}), encoding="utf-8")
    return path


@pytest.fixture
def run(settings_of_run: dict[str, Any]) -> Path:
    return Path(settings_of_run["output_dir"])


def distill(client: Client, *arguments: str, token: str | None = WRITER) -> Outcome:
    """``result`` is the exit status."""
    return client.run(
        f"import os\nos.environ.pop('HF_TOKEN', None)\nos.environ |= {{'HF_TOKEN': {token!r}}} if {token!r} else {{}}\n"
        f"from training import distill\nresult = distill.main({list(arguments)!r})"
    )


def last_line(outcome: Outcome, status: int) -> str:
    assert (outcome.result, outcome.error) == (status, None), outcome
    return outcome.said.strip().splitlines()[-1]


def test_a_run_is_pushed_and_its_card_s_first_code_samples_from_the_hub(
    hub: Hub, client: Client, config_file: Path, run: Path
) -> None:
    outcome = distill(client, "--config", str(config_file), "--push_to_hub", REPO, "--private")
    assert last_line(outcome, 0) == f"pushed: {hub.url}/{REPO}"
    assert hub.repositories[REPO].private
    files = hub.files(REPO)
    for name in ("phased_experts.json", "high_noise.safetensors", "low_noise.safetensors"):
        assert files[name] == (run / "experts" / name).read_bytes()
    assert files["samples/low_noise-final.png"] == (run / "samples" / "low_noise-final.png").read_bytes()
    card = files["README.md"].decode()
    assert (
        "![The last samples of the training: one prompt a row, one seed a column](samples/low_noise-final.png)" in card
    )
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    assert REPO in code
    sampled = client.run(f"{code}\nresult = [picture.shape, pipe.scheduler.plan.to_json()]")
    assert sampled.error is None, sampled
    manifest = json.loads(files["phased_experts.json"])
    assert sampled.result == [[1, 16, 16, 3], json.dumps(manifest["plan"])]
    assert hub.asked(f"GET /{REPO}/resolve/.*/low_noise.safetensors")


def test_a_push_that_fails_loses_nothing_and_says_how_to_push_again(
    hub: Hub, client: Client, config_file: Path, run: Path
) -> None:
    hub.fail("/commit/", times=100)
    line = last_line(distill(client, "--config", str(config_file), "--push_to_hub", REPO), 2)
    assert "the Hub answers 500" in line and f"stays in {run}" in line
    hub.faults.clear()
    command = shlex.split(line.partition("To push again: ")[2])
    assert command[:2] == ["python", "training/distill.py"]
    rows = [{"method": "experts", "network_evaluations": 4, "frechet": 0.5}]
    (run / "report.json").write_text(json.dumps({"features": "FD", "rows": rows}))
    (run / "report.png").write_bytes(b"picture")
    assert last_line(distill(client, *command[2:]), 0) == f"pushed: {hub.url}/{REPO}"
    files = hub.files(REPO)
    assert files["low_noise.safetensors"] == (run / "experts" / "low_noise.safetensors").read_bytes()
    assert files["samples/comparison.png"] == b"picture" and "| experts | 4 | 0.5 |" in files["README.md"].decode()


def test_a_report_of_earlier_experts_is_not_pushed(hub: Hub, client: Client, config_file: Path, run: Path) -> None:
    assert distill(client, "--config", str(config_file)).result == 0
    for folder in (run, run / "experts"):
        (folder / "report.json").write_text('{"rows": [], "experts": {"experts": {"low_noise": "0"}}}')
    outcome = distill(client, "--push_to_hub", REPO, "--output_dir", str(run))
    assert outcome.result == 0 and outcome.said.count("was measured with other experts") == 2
    assert "report.json" not in hub.files(REPO) and "Measurements" not in hub.files(REPO)["README.md"].decode()


def test_a_report_of_these_experts_is_pushed_whatever_its_time(
    hub: Hub, client: Client, config_file: Path, run: Path
) -> None:
    assert distill(client, "--config", str(config_file)).result == 0
    manifest = json.loads((run / "experts" / "phased_experts.json").read_text())
    hashes = {expert["name"]: expert["sha256"] for expert in manifest["experts"]}
    rows = [{"method": "experts", "network_evaluations": 4, "frechet": 0.5}]
    report = {"features": "FD", "rows": rows, "experts": {"experts": hashes}}
    (run / "report.json").write_text(json.dumps(report))
    os.utime(run / "report.json", (1, 1))
    assert distill(client, "--push_to_hub", REPO, "--output_dir", str(run)).result == 0
    assert "| experts | 4 | 0.5 |" in hub.files(REPO)["README.md"].decode()


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [("hf_wrong", REPO, "refuses the token"), (None, REPO, "no token"), (WRITER, "a/b/c", "user/name")],
)
def test_what_cannot_be_pushed_is_said_before_anything_is_trained(
    hub: Hub, client: Client, config_file: Path, run: Path, token: str | None, repo: str, words: str
) -> None:
    outcome = distill(client, "--config", str(config_file), "--push_to_hub", repo, token=token)
    assert words in last_line(outcome, 2)
    assert not run.exists()


def test_a_push_on_its_own_needs_a_finished_run(hub: Hub, client: Client, tmp_path: Path) -> None:
    assert "give --config" in last_line(distill(client, "--push_to_hub", REPO), 2)
    assert "give --config" in last_line(distill(client, "--output_dir", str(tmp_path)), 2)
    line = last_line(distill(client, "--push_to_hub", REPO, "--output_dir", str(tmp_path)), 2)
    assert "no such folder" in line and "push again" in line
    assert not hub.requests

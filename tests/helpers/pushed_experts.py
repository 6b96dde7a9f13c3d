"""Experts pushed to a hub of ``tests/helpers/hub.py`` and loaded from it, by client code in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pdmd_core.experts import MANIFEST_NAME
from pdmd_core.phases import PhasePlan
from tests.helpers.hub_client import Client, Outcome

PLAN = PhasePlan.from_steps([2, 2], shift=5.0)
FILES = {MANIFEST_NAME, "high_noise.safetensors", "low_noise.safetensors", "scheduler/scheduler_config.json"}
HIGH = "high_noise.safetensors"


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


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

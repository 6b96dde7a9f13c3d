"""Thousands of broken manifests and safetensors files: each is read or refused in one line, no more."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from pdmd_core.experts import (
    MANIFEST_NAME,
    BaseModel,
    Expert,
    ExpertsError,
    Manifest,
    PhasedExperts,
    lora_to_file,
    read_manifest,
    write_experts,
)
from pdmd_core.experts.format.fingerprint import base_warning, sampler_of, take_fingerprint
from pdmd_core.experts.format.header import read_header
from pdmd_core.experts.format.weights import open_weights
from pdmd_core.experts.inspect import inspect, report_text
from pdmd_core.families import FAMILIES, family
from pdmd_core.phases import PhasePlan
from tests.helpers.faults.mutations import damaged, documents
from tests.helpers.faults.watch import only_reads

WAN = family("wan")
PLAN = PhasePlan.from_steps([1, 1], shift=5.0)
IN_CI, LONG = 3500, 20_000
"""Examples of each of the three tests."""
SLOWEST = 20.0
"""Seconds for one file, on a machine that does other things as well; a thousandth of it is usual."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid experts folder, small; its files are overwritten by each example."""
    target = tmp_path_factory.mktemp("fuzz") / "experts"
    entries, weights = [], {}
    for k, phase in enumerate(PLAN.phases):
        halves = {"lora_A": torch.full((2, 3), k + 1.0), "lora_B": torch.ones(3, 2)}
        state = {f"blocks.0.attn1.to_q.{part}": value for part, value in halves.items()}
        weights[phase.name] = lora_to_file(state, 2.0, WAN)
        file = f"{phase.name}.safetensors"
        entries.append(Expert(phase.name, file, "lora", "", rank=2, alpha=2.0, targets=("attn1.to_q",)))
    training = {"size": [16, 16, 1], "losses": [0.5, {"last": 0.25}]}
    values = {
        name: torch.full((32,), k + 1.0) for k, name in enumerate(("blocks.0.norm2.weight", "blocks.1.ffn.0.bias"))
    }
    prints = take_fingerprint(values, sampler_of(values))
    base = BaseModel("tiny/wan", WAN.architecture, "wan", None, {"transformer": prints, "transformer_2": prints})
    write_experts(target, Manifest(base, PLAN, tuple(entries), 1.0, training), weights)
    for name in FAMILIES:  # what is imported late is imported now
        family(name)
    read_everything(target)
    return target


def read_everything(folder: Path) -> None:
    """All that this package does with a folder of a stranger's, short of a base."""
    experts = PhasedExperts.open(folder)
    report_text(inspect(folder))
    for expert in experts.manifest.experts:
        assert experts.path(expert.name).parent == folder
        if expert.kind == "lora":
            experts.lora_state(expert.name)
        experts.tensors(expert.name)
    manifest = experts.manifest
    for component in manifest.base.fingerprints or {}:
        base_warning(manifest.base, component, lambda name: torch.ones(32), "a base")
    assert Manifest.from_json(manifest.to_json()).to_json() == manifest.to_json()


def read_file(path: Path) -> None:
    """All that this package does with a single file of a stranger's."""
    report_text(inspect(path))
    weights = open_weights(path)
    for name in weights.specs:
        weights.read(name)
    one = PhasePlan.from_steps([1])
    experts = PhasedExperts.from_lora_files(one, path)
    experts.tensors("all_noise")
    if experts.manifest.base.family in FAMILIES:
        experts.lora_changes("all_noise")


def read_or_refused(read: Callable[[Path], None], path: Path, folder: Path) -> bool:
    """Whether it was read. Whatever else happens than reading and a refusal in one line fails."""
    started = time.monotonic()
    with only_reads(folder):
        try:
            read(path)
            accepted = True
        except ExpertsError as error:
            text = str(error)
            accepted = False
    assert time.monotonic() - started < SLOWEST
    if not accepted:
        assert str(path) in text or ".safetensors" in text or "families" in text or "family" in text, text
        assert len(text.splitlines()) == 1 and text.isprintable() and len(text.replace(str(path), "")) < 600, text
    return accepted


class Tally:
    """How many were read and refused: a fuzzing test that only ever does one of both tests little."""

    def __init__(self) -> None:
        self.read = self.refused = 0

    def count(self, accepted: bool) -> None:
        self.read, self.refused = self.read + accepted, self.refused + (not accepted)


def run(test: Callable[[Any], None], strategy: st.SearchStrategy[Any], examples: int) -> None:
    """Hypothesis with the number of examples as an argument; the same examples every time."""
    unhurried = settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck))
    unhurried(given(strategy)(test))()


# --- manifests ----------------------------------------------------------------


def fuzz_manifests(folder: Path, examples: int) -> Tally:
    path, tally = folder / MANIFEST_NAME, Tally()
    valid = path.read_bytes()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        tally.count(read_or_refused(read_everything, folder, folder))

    try:
        run(check, documents(json.loads(valid)), examples)
    finally:
        path.write_bytes(valid)
    return tally


# --- headers and files ----------------------------------------------------------


def as_file(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def fuzz_headers(folder: Path, examples: int) -> Tally:
    """The header alone is broken: its length is right, so that all of it is looked at."""
    path, tally = folder / "high_noise.safetensors", Tally()
    valid = path.read_bytes()
    start = 8 + int.from_bytes(valid[:8], "little")
    header = json.loads(valid[8:start])
    header["__metadata__"] = {"format": "pt", "text": "of another program"}

    def check(content: bytes) -> None:
        path.write_bytes(as_file(content, valid[start:]))
        tally.count(read_or_refused(read_file, path, folder))
        same_as_the_library(path)

    try:
        run(check, documents(header), examples)
    finally:
        path.write_bytes(valid)
    return tally


def fuzz_files(folder: Path, examples: int) -> Tally:
    """Any byte of a file may be wrong, and the manifest has the hash of the broken file."""
    manifest_path, path, tally = folder / MANIFEST_NAME, folder / "high_noise.safetensors", Tally()
    valid, text = path.read_bytes(), manifest_path.read_bytes()
    manifest = read_manifest(folder)

    def check(content: bytes) -> None:
        path.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        entries = (replace(manifest.experts[0], sha256=digest), manifest.experts[1])
        manifest_path.write_text(replace(manifest, experts=entries).to_json(), encoding="utf-8")
        tally.count(read_or_refused(read_everything, folder, folder))
        read_or_refused(read_file, path, folder)
        same_as_the_library(path)

    try:
        run(check, damaged(valid), examples)
    finally:
        path.write_bytes(valid)
        manifest_path.write_bytes(text)
    return tally


def same_as_the_library(path: Path) -> None:
    """What is accepted here is what safetensors itself reads, value by value."""
    try:
        header = read_header(path)
    except ExpertsError:
        return
    weights, theirs = open_weights(path), load_file(path)
    assert header.specs.keys() == theirs.keys()
    assert all(weights.read(name).equal(value) or value.isnan().any() for name, value in theirs.items())
    with safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == header.metadata


# --- in CI, and for long --------------------------------------------------------


FUZZERS = {"manifests": fuzz_manifests, "headers": fuzz_headers, "files": fuzz_files}


@pytest.mark.parametrize("kind", FUZZERS)
def test_whatever_is_broken_is_read_or_refused_in_one_line(folder: Path, kind: str) -> None:
    tally = FUZZERS[kind](folder, IN_CI)
    assert tally.read + tally.refused >= IN_CI and tally.read > 20 and tally.refused > IN_CI // 2, vars(tally)


@pytest.mark.long
@pytest.mark.timeout(14_400)
@pytest.mark.parametrize("kind", FUZZERS)
def test_whatever_is_broken_is_read_or_refused_for_long(folder: Path, kind: str) -> None:
    tally = FUZZERS[kind](folder, LONG)
    print(f"\n{kind}: {tally.read} read, {tally.refused} refused")
    assert tally.read + tally.refused >= LONG

"""Rows kept on disk, and the hashes that say which rows are the same."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from pdmd_core.experts import PhasedExperts
from pdmd_core.phases import PhasePlan
from tests.helpers.families.parts import picture
from tests.helpers.tiny import save_wan_pipeline
from tests.helpers.tiny_experts import save_experts
from training.data.examples import Example
from training.data.teacher import TeacherSource
from training.evaluation.cache import TensorCache
from training.evaluation.identity import FileHashes, example_identity, experts_identity, teacher_identity


def filled(folder: Path) -> TensorCache:
    store = TensorCache(folder)
    store.add(["a", "b"], {"x": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "n": torch.tensor([1, 2])})
    store.add(["c"], {"x": torch.tensor([[5.0, 6.0]]), "n": torch.tensor([3])})
    return store


def test_rows_come_back_in_the_order_asked_for_and_after_opening_again(tmp_path: Path) -> None:
    for store in (filled(tmp_path / "s"), TensorCache(tmp_path / "s")):
        rows = store.rows(["c", "a", "c"])
        assert rows["x"].tolist() == [[5, 6], [1, 2], [5, 6]]
        assert rows["n"].tolist() == [3, 1, 3]
        assert set(store.rows(["a"], ["n"])) == {"n"}
        assert "b" in store and store.missing(["x", "b", "x", "y"]) == ["x", "y"]


def test_rows_and_ids_are_of_one_length(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 2 rows"):
        TensorCache(tmp_path).add(["a", "b"], {"x": torch.zeros(3)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["one bit", "cut off", "empty", "not safetensors"])
def test_a_damaged_file_counts_as_missing(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path / "s")
    (path,) = [p for p in (tmp_path / "s").iterdir() if TensorCache(tmp_path / "s")._where["a"][0] == p]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes({"one bit": data, "cut off": data[:-9], "empty": b"", "not safetensors": b"hello"}[kind])
    capsys.readouterr()
    store = TensorCache(tmp_path / "s")
    assert store.missing(["a", "b", "c"]) == ["a", "b"]
    assert not path.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and "damaged" in line


def test_a_kill_while_writing_leaves_nothing_of_the_batch(tmp_path: Path) -> None:
    store = TensorCache(tmp_path)
    with mock.patch.object(Path, "replace", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        store.add(["a"], {"x": torch.zeros(1)})
    assert TensorCache(tmp_path).missing(["a"]) == ["a"]


def test_hashes_are_of_content_and_read_again_only_when_a_file_changed(tmp_path: Path) -> None:
    file, memory = tmp_path / "f", tmp_path / "memory.json"
    file.write_text("one", encoding="utf-8")
    first = FileHashes(memory)(file)
    with mock.patch("training.evaluation.identity.sha256_of", side_effect=AssertionError("read again")):
        assert FileHashes(memory)(file) == first
    file.write_text("two", encoding="utf-8")
    os.utime(file, ns=(1, 1))
    assert FileHashes(memory)(file) != first
    memory.write_text("not json", encoding="utf-8")
    assert FileHashes(memory)(file) != first


def test_a_teacher_is_its_weights_not_its_place(tmp_path: Path) -> None:
    hashes = FileHashes(tmp_path / "memory.json")
    one, other = save_wan_pipeline(tmp_path / "one"), save_wan_pipeline(tmp_path / "other")
    identity = teacher_identity(TeacherSource(str(one)), hashes)
    assert teacher_identity(TeacherSource(str(other)), hashes) == identity
    assert teacher_identity(TeacherSource(str(one), pipeline="WanPipeline"), hashes) != identity
    index = json.loads((other / "model_index.json").read_text(encoding="utf-8"))
    (other / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": 0.5}), encoding="utf-8")
    assert teacher_identity(TeacherSource(str(other)), hashes) != identity
    for part in ("transformer", "vae", "text_encoder"):
        folder = save_wan_pipeline(tmp_path / part)
        weights = next((folder / part).glob("*.safetensors"))
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        assert teacher_identity(TeacherSource(str(folder)), hashes) != identity, part


def test_a_teacher_of_the_hub_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cached(commit: str) -> str:
        snapshot = tmp_path / "hub" / "models--user--teacher" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "model_index.json").write_text("{}", encoding="utf-8")
        (snapshot.parents[1] / "refs").mkdir(exist_ok=True)
        (snapshot.parents[1] / "refs" / "main").write_text(commit, encoding="utf-8")
        with mock.patch.object(TeacherSource, "index", return_value={}):
            return teacher_identity(TeacherSource("user/teacher"), FileHashes(tmp_path / "memory.json"))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert cached("a" * 40) != cached("b" * 40)


def test_experts_are_their_weights_and_plan(tmp_path: Path) -> None:
    teacher = save_wan_pipeline(tmp_path / "teacher")
    other_plan = PhasePlan.from_steps([1, 1], shift=4.0)
    folders = [
        save_experts(tmp_path / name, teacher, (64, 64, 1), **changes)
        for name, changes in (("a", {}), ("b", {}), ("c", {"seed": 1}), ("d", {"plan": other_plan}))
    ]
    first, same, *others = (PhasedExperts.open(folder).manifest for folder in folders)
    assert experts_identity(replace(same, training={"size": "another note"})) == experts_identity(first)
    assert len({experts_identity(manifest) for manifest in (first, *others)}) == 3


def test_an_example_is_its_prompt_and_the_content_of_its_image(tmp_path: Path) -> None:
    hashes = FileHashes(tmp_path / "memory.json")
    for name, seed in (("a.png", 0), ("b.png", 0), ("c.png", 1)):
        picture(seed).save(tmp_path / name)
    a, b, c = (example_identity(Example("x", tmp_path / f"{name}.png"), hashes) for name in "abc")
    assert a == b != c
    assert example_identity(Example("x", (tmp_path / "a.png").read_bytes()), hashes) == a
    assert example_identity(Example("x"), hashes) not in (a, example_identity(Example("y"), hashes))

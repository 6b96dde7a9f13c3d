"""Checkpoints: whole or absent, newest kept, nothing in them is run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from training.loop.checkpoints import CheckpointError, list_checkpoints, load_tensors, load_values, save_checkpoint

VALUES = {"update": 4, "names": ["a"]}


def weights(value: float) -> dict[str, Tensor]:
    return {"roles/a/b.c": torch.full((3,), value), "steps": torch.tensor(value), "draws": torch.arange(5).byte()}


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def test_the_newest_are_kept_and_read_back(tmp_path: Path) -> None:
    for update in range(5):
        save_checkpoint(tmp_path, update, weights(update), {"update": update}, keep=2)
    assert names(tmp_path) == ["update-00000003", "update-00000004"]
    assert {path.name for path in tmp_path.iterdir()} == set(names(tmp_path)), "nothing temporary stays"
    newest = list_checkpoints(tmp_path)[-1]
    assert load_values(newest) == {"update": 4}
    found = {name: torch.zeros_like(value) for name, value in weights(4).items()}
    load_tensors(newest, found)
    assert all(torch.equal(found[name], value) for name, value in weights(4).items())


@pytest.mark.parametrize(
    "fails", ["torch.distributed.checkpoint.save", "training.loop.checkpoints.json.dump", "os.fsync"]
)
def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path: Path, fails: str) -> None:
    save_checkpoint(tmp_path, 1, weights(1), VALUES, keep=1)
    with (
        mock.patch(fails, side_effect=OSError(28, "No space left on device")),
        pytest.raises(CheckpointError, match=r"update-00000002: cannot be written.*No space left") as error,
    ):
        save_checkpoint(tmp_path, 2, weights(2), VALUES, keep=1)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["update-00000001"]
    assert load_values(list_checkpoints(tmp_path)[0]) == VALUES
    save_checkpoint(tmp_path, 2, weights(2), VALUES, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"update-00000002"}, "what the failure left is gone"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:40])


@pytest.mark.parametrize("damage", [cut, Path.unlink, lambda file: file.write_bytes(b"")])
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, damage: object) -> None:
    path = save_checkpoint(tmp_path, 1, weights(1), VALUES, keep=1)
    (file,) = path.glob("*.safetensors")
    damage(file)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="remove it to use an older one") as error:
        load_tensors(path, weights(0))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff"])
def test_damaged_values_are_one_line(tmp_path: Path, content: bytes) -> None:
    path = save_checkpoint(tmp_path, 1, weights(1), VALUES, keep=1)
    (path / "run.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="remove it to use an older one") as error:
        load_values(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wanted", [{"other": torch.zeros(3)}, {"steps": torch.zeros(4)}, {"roles/a/b.c": torch.zeros(2)}]
)
def test_other_tensors_than_it_holds_are_one_line(tmp_path: Path, wanted: dict[str, Tensor]) -> None:
    path = save_checkpoint(tmp_path, 1, weights(1), VALUES, keep=1)
    with pytest.raises(CheckpointError, match="remove it to use an older one"):
        load_tensors(path, wanted)


class Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.mkdir, (self.marker,)  # type: ignore[return-value]


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path, marker = save_checkpoint(tmp_path, 1, weights(1), VALUES, keep=1), tmp_path / "marker"
    (shards,) = path.glob("*.safetensors")
    for name in ("__0_0.distcp", shards.name):
        torch.save(Runs(marker), path / name)
    (path / ".metadata").write_bytes(pickle.dumps(Runs(marker)))
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_tensors(path, weights(0))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [({"update": 4}, "one of an earlier version, with pickled parts"), ({"format": 4}, "format 4")],
)
def test_a_checkpoint_of_another_version_is_one_line(tmp_path: Path, content: dict[str, int], found: str) -> None:
    path = save_checkpoint(tmp_path, 1, weights(1), VALUES, keep=1)
    (path / "run.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"expected a checkpoint of format 3, found {found}: go on with") as error:
        load_values(path)
    assert "\n" not in str(error.value)


def test_tensors_of_every_kind_come_back_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In as many files as it takes: a process holds what goes into one of them twice."""
    monkeypatch.setattr("training.loop.checkpoints.MAX_FILE_BYTES", 100)
    tensors = {f"{dtype}": (torch.rand(4, 6) * 50).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.uint8)}
    tensors |= {"step": torch.tensor(3.0), "count": torch.tensor(2**40), "flag": torch.tensor(True)}
    tensors |= {"turned": torch.randn(5, 3).T, "none": torch.empty(0, 3), "view": torch.randn(12)[3:7]}
    path = save_checkpoint(tmp_path, 1, tensors, VALUES, keep=1)
    sizes = [sum(v.nbytes for v in load_file(file).values()) for file in path.glob("*.safetensors")]
    assert len(sizes) == 3 and max(sizes) <= 100
    found = {name: torch.zeros_like(value) for name, value in tensors.items()}
    load_tensors(path, found)
    for name, value in tensors.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name

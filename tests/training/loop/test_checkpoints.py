"""Checkpoints: whole or absent, newest kept, nothing in them is run."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
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
@pytest.mark.parametrize("part", [".metadata", "*.distcp"])
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, part: str, damage: object) -> None:
    path = save_checkpoint(tmp_path, 1, weights(1), VALUES, keep=1)
    (file,) = path.glob(part)
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
    path = save_checkpoint(tmp_path, 1, weights(1), VALUES, keep=1)
    good, marker = tmp_path / "good", tmp_path / "marker"
    shutil.copytree(path, good)
    (path / ".metadata").write_bytes(pickle.dumps(Runs(marker)))
    with pytest.raises(CheckpointError, match="no checkpoint of ours holds"):
        load_tensors(path, weights(0))
    (shards,) = good.glob("*.distcp")
    torch.save(Runs(marker), shards)
    with pytest.raises(CheckpointError):
        load_tensors(good, weights(0))
    assert not marker.exists()


def test_an_entry_that_is_no_tensor_is_not_read(tmp_path: Path) -> None:
    """torch.distributed.checkpoint would unpickle it."""
    path = tmp_path / "update-00000001"
    save_checkpoint(tmp_path, 1, {"steps": Path("object")}, VALUES, keep=1)  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="BytesStorageMetadata"):
        load_tensors(path, {"steps": torch.zeros(3)})

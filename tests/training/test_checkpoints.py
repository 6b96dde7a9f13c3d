"""Checkpoints: whole or absent, newest kept."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from training.checkpoints import CheckpointError, list_checkpoints, load_checkpoint, save_checkpoint


def test_the_newest_are_kept_and_read_back(tmp_path: Path) -> None:
    for update in range(5):
        save_checkpoint(tmp_path, update, {"update": update, "weights": torch.full((3,), float(update))}, keep=2)
    found = list_checkpoints(tmp_path)
    assert [path.name for path in found] == ["update-00000003", "update-00000004"]
    state = load_checkpoint(found[-1])
    assert state["update"] == 4
    assert torch.equal(state["weights"], torch.full((3,), 4.0))


def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"update": 1}, keep=1)
    with mock.patch("torch.save", side_effect=OSError("disk full")), pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, 2, {"update": 2}, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["update-00000001"]
    assert load_checkpoint(list_checkpoints(tmp_path)[0]) == {"update": 1}


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint at all"])
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, damage: bytes) -> None:
    path = save_checkpoint(tmp_path, 1, {"update": 1}, keep=1)
    (path / "state.pt").write_bytes(damage)
    with pytest.raises(CheckpointError, match="remove it to use an older one") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"update": 1}, keep=1)
    torch.save({"evil": Path}, path / "state.pt")
    with pytest.raises(CheckpointError):
        load_checkpoint(path)

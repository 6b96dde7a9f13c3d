"""Checkpoints that a thread writes: of the moment at which they were asked for, whole or an error in one line."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from training.loop import checkpoint_writer
from training.loop.checkpoint_writer import CheckpointWriter
from training.loop.checkpoints import CheckpointError, list_checkpoints, load_tensors, save_checkpoint


def never(update: int) -> bool:
    return False


def test_it_holds_what_was_there_when_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def slow(*given: object) -> Path:
        assert go_on.wait(30)
        return save_checkpoint(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", slow)
    weights = {"a": torch.ones(3), "b": torch.arange(4)}
    with CheckpointWriter(background=True) as writer:
        target = writer.save(tmp_path, 1, weights, {}, 2, never)
        weights["a"].mul_(5)  # the next update
        writer.check()
        assert not list_checkpoints(tmp_path), "it is still being written"
        go_on.set()
        second = writer.save(tmp_path, 2, weights, {}, 2, never)
        assert list_checkpoints(tmp_path)[0] == target, "one at a time"
    assert list_checkpoints(tmp_path) == [target, second]
    for path, value in ((target, 1.0), (second, 5.0)):
        found = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        load_tensors(path, found)
        assert torch.equal(found["a"], torch.full((3,), value)) and torch.equal(found["b"], weights["b"])


def test_what_fails_is_one_line_at_the_next_update_and_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter(background=True)
    writer.save(tmp_path / "file", 1, {"a": torch.ones(1)}, {}, 2, never)
    assert writer._pending is not None
    writer._pending.exception(30)
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        writer.check()
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="cannot be written"), writer:
        writer.save(tmp_path / "file", 2, {"a": torch.ones(1)}, {}, 2, never)
    with pytest.raises(KeyboardInterrupt), writer:
        writer.save(tmp_path / "file", 3, {"a": torch.ones(1)}, {}, 2, never)
        raise KeyboardInterrupt
    assert "cannot be written" in capsys.readouterr().err, "what ended the run comes first"

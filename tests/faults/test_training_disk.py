"""A disk that is full, closed or damages files: what was good stays, what happened is said, the run can go on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.faults.conftest import Uninterrupted
from tests.helpers.faults.distillations import Distillation
from training.loop.checkpoints import CheckpointError, newest_whole, save_checkpoint
from training.loop.run_lock import OutputFolderError, lock_output_dir

SHARDS = "shard-00001-model-00001-of-00001.safetensors"
PARTS = ("run.json", "sha256.json", SHARDS)


@pytest.mark.parametrize(
    ("error", "text"), [("ENOSPC", "No space left on device"), ("EFBIG", "File too large")], ids=["injected", "real"]
)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            r"write checkpoints/\.unfinished-00000004",
            "cannot be written, the checkpoints before are kept; it takes ",
        ),
        ("write experts/", "what was written whole stays; make room"),
    ],
    ids=["checkpoint", "experts"],
)
def test_a_full_disk_ends_a_run_with_its_last_checkpoint(
    change: str,
    words: str,
    error: str,
    text: str,
    distillation: Callable[..., Distillation],
    uninterrupted: Uninterrupted,
) -> None:
    """Injected, every write ends at its start; the real one, a limit of the kernel, ends in the middle of a file."""
    run = distillation()
    ended = run.run(faults=[run.at(change, error)])
    assert ended.status == 2, ended.errors
    (line,) = ended.lines
    assert words in line and text in line and "--resume" in line
    assert "Traceback" not in ended.errors
    assert run.checkpoints[-1] == ("update-00000006" if "experts" in change else "update-00000003")
    run.check_nothing_half_written_counts()
    assert run.run("--resume").status == 0
    assert run.results() == uninterrupted.results


def test_what_only_watches_a_run_does_not_end_it_on_a_full_disk(
    distillation: Callable[..., Distillation], uninterrupted: Uninterrupted
) -> None:
    run = distillation()
    ended = run.run(faults=[run.at(r"^\w+ \.?(metrics|samples|watch|report)", "ENOSPC")])
    assert ended.status == 0, ended.errors
    for who in ("Metrics failed", "samples high_noise-final are not written", "Observer failed"):
        assert any(who in line and "No space left on device" in line for line in ended.warnings), (who, ended.warnings)
    found = run.results()
    assert found == {name: data for name, data in uninterrupted.results.items() if name.startswith("experts")}


def test_a_disk_that_fills_up_while_prompts_are_encoded_is_one_line(distillation: Callable[..., Distillation]) -> None:
    """A limit of the kernel, which ends the write inside the library safetensors."""
    run = distillation()
    ended = run.run(faults=[{"name": "largest_file", "size": 2500, "kill": False}])
    assert ended.status == 2, ended.errors
    (line,) = ended.lines
    assert "File too large: what was written whole stays; make room" in line
    assert run.run().status == 0


def test_a_folder_that_cannot_be_written_is_said_before_anything_else(
    distillation: Callable[..., Distillation], tmp_path: Path
) -> None:
    run = distillation()
    ended = run.run(faults=[run.at("", "EROFS")])
    assert ended.status == 2 and not ended.output
    (line,) = ended.lines
    assert line.startswith(f"distill.py: {run.folder}: cannot be written (Read-only file system); ")
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "run", tmp_path / "file", Path("/proc/phased-dmd")):
        with (
            pytest.raises(OutputFolderError, match="cannot be written") as error,
            lock_output_dir(folder, resume=False),
        ):
            pass
        assert "\n" not in str(error.value)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink], ids=["cut", "flip", "unlink"])
@pytest.mark.parametrize("part", PARTS)
def test_any_damage_to_any_file_of_a_checkpoint_is_seen(
    part: str, harm: Callable[[Path], None], tmp_path: Path
) -> None:
    tensors = {"roles/a/b": torch.arange(8.0), "draws": torch.arange(5).byte()}
    older, newer = (save_checkpoint(tmp_path, update, tensors, {"update": update}, keep=2) for update in (1, 2))
    said: list[str] = []
    assert newest_whole(tmp_path, said.append) == newer and not said
    harm(newer / part)
    assert newest_whole(tmp_path, said.append) == older
    if (part, harm) == ("run.json", Path.unlink):
        return  # was never complete
    (line,) = said
    assert line.startswith(f"{newer} is damaged (") and line.endswith("going on from update-00000001")
    assert part in line or (part, harm) == ("sha256.json", flip)
    assert (tmp_path / "damaged-update-00000002").is_dir(), "nothing is lost"
    harm(older / part)
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged .* to start anew") as error:
        newest_whole(tmp_path, said.append)
    assert "\n" not in str(error.value) and older.is_dir()


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    distillation: Callable[..., Distillation], uninterrupted: Uninterrupted
) -> None:
    run = distillation()
    shutil.copytree(uninterrupted.run.folder, run.folder)
    newest = run.folder / "checkpoints" / "update-00000006"
    flip(newest / SHARDS)
    shutil.rmtree(run.folder / "experts")
    ended = run.run("--resume")
    assert ended.status == 0, ended.errors
    (line,) = [line for line in ended.warnings if "damaged" in line]
    assert f"{newest} is damaged ({SHARDS} is not what was written)" in line
    assert "resumed from" in ended.output and "update-00000004" in ended.output
    assert run.results() == uninterrupted.results
    for path in (run.folder / "checkpoints").glob("update-*"):
        flip(path / SHARDS)
    ended = run.run("--resume")
    assert ended.status == 2
    assert "every checkpoint is damaged" in ended.lines[-1]
    assert run.results() == uninterrupted.results

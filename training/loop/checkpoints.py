"""Checkpoints of a run: written whole or not at all by all processes together, read by any number of them.

A checkpoint is a folder of safetensors files with the shards of every process, ``run.json`` for what is no tensor, and
``sha256.json``, which shows damage to any of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from pdmd_core.experts.format.header import read_header
from training.config.command_line import UserError
from training.loop.digests import find_damage, write_digests

VALUES = "run.json"
FORMAT = 3
"""Checkpoints of format 1 had pickled parts and did not say their format, those of format 2 one generator for all
samples."""
MAX_FILE_BYTES = 2**31
"""Of the tensors in a file, the shards of all processes together: a process holds its part in memory twice to write."""
_NAME = re.compile(r"update-(\d{8})")
_UNFINISHED = ".unfinished-"
"""What a checkpoint is called while it is written or removed."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read: one line."""


def save_checkpoint(
    folder: Path,
    update: int,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    keep: int,
    for_good: Callable[[int], bool] = lambda update: False,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write ``folder/update-<n>`` through a temporary folder, then remove older ones.

    All processes save together: each writes its shards, the first one the rest.

    Args:
        folder: Where the checkpoints of a run lie.
        update: Number of updates so far, over all phases.
        tensors: Name to tensor: whole, a DTensor, or one that consists of others as 8-bit optimizer states do.
        values: What is no tensor, as JSON knows it.
        keep: How many of the newest stay, this one counted.
        for_good: Whether the checkpoint of an update stays however old it is.
        group: Over what processes tell each other, where others use the default group meanwhile.

    Returns:
        The folder of this checkpoint.

    Raises:
        CheckpointError: If it cannot be written; the checkpoints before are untouched then.
    """
    target, temporary = folder / f"update-{update:08d}", folder / f"{_UNFINISHED}{update:08d}"
    alone, first = not dist.is_initialized(), not dist.is_initialized() or dist.get_rank() == 0
    plain = plain_tensors(tensors)
    with _one_line(lambda: _not_written(target, plain)), _removed_on_failure(temporary):
        if first:
            for left in folder.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True)
        _wait_for_all(group)
        with _without_warnings():
            writer = HuggingFaceStorageWriter(str(temporary), _file_numbers(plain), save_distributed=True)
            contiguous = {name: value.contiguous() for name, value in plain.items()}
            dcp.save(contiguous, storage_writer=writer, process_group=group, no_dist=alone)
        if first:
            with (temporary / VALUES).open("w", encoding="utf-8") as file:
                json.dump({"format": FORMAT, "values": values}, file)
                file.flush()
                os.fsync(file.fileno())
        _wait_for_all(group)
        write_digests(temporary, group)
        if first:
            _sync(temporary)
            _remove(target)
            temporary.replace(target)
            _sync(folder)
            for old in list_checkpoints(folder)[:-keep]:
                if not for_good(update_of(old)):
                    _remove(old)
        _wait_for_all(group)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints of a folder.

    Args:
        folder: Where the checkpoints of a run lie.

    Returns:
        The checkpoints, oldest first; none if there is no such folder.
    """
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / VALUES).is_file())


def newest_whole(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Find the newest checkpoint whose files are what was written. All processes ask together.

    Newer ones that are damaged are set aside under the name ``damaged-...``.

    Args:
        folder: Where the checkpoints of a run lie.
        warn: Is told of each one that is set aside, in a line.

    Returns:
        The checkpoint; None when there is none.

    Raises:
        CheckpointError: If there are checkpoints and every one is damaged.
    """
    problems: dict[Path, str] = {}
    for checkpoint in reversed(list_checkpoints(folder)):
        problem = find_damage(checkpoint)
        if problem is None:
            for path, text in problems.items():
                aside = folder / f"damaged-{path.name}"
                warn(f"{path} is damaged ({text}): it is now {aside.name}, going on from {checkpoint.name}")
                if not dist.is_initialized() or dist.get_rank() == 0:
                    shutil.rmtree(aside, ignore_errors=True)
                    path.replace(aside)
            _wait_for_all()
            return checkpoint
        problems[checkpoint] = problem
    if problems:
        found = "; ".join(f"{path.name}: {text}" for path, text in problems.items())
        raise CheckpointError(
            f"{folder}: every checkpoint is damaged ({found}); bring one back from a copy, or remove this folder to "
            "start anew"
        )
    return None


def update_of(checkpoint: Path) -> int:
    """The number of updates that were done when a checkpoint was taken."""
    return int(checkpoint.name.rpartition("-")[2])


def whole_checkpoint(folder: Path, update: int) -> Path:
    """The checkpoint of an update, whose files are what was written. All processes ask together.

    Args:
        folder: Where checkpoints are.
        update: How many updates were done.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    found = {update_of(path): path for path in list_checkpoints(folder)}
    if update not in found:
        there = ", ".join(map(str, found)) or "none"
        raise CheckpointError(f"{folder}: no checkpoint of update {update}; there are those of: {there}")
    if problem := find_damage(found[update]):
        raise CheckpointError(f"{found[update]} is damaged ({problem}): choose another checkpoint")
    return found[update]


def set_aside_later(checkpoint: Path) -> list[Path]:
    """Give checkpoints that are newer than this one names that are no checkpoints', for a run that goes back to it.

    All processes ask together. The newest is renamed last: until then the run would go on from that.

    Args:
        checkpoint: Where the run goes on.

    Returns:
        Their new places.
    """
    aside: list[Path] = []
    if not dist.is_initialized() or dist.get_rank() == 0:
        for path in list_checkpoints(checkpoint.parent):
            if path.name > checkpoint.name:
                number = sum(1 for _ in checkpoint.parent.glob(f"aside-*-{path.name}"))
                aside.append(path.replace(path.with_name(f"aside-{number}-{path.name}")))
    _wait_for_all()
    return aside


def load_values(path: Path) -> dict[str, Any]:
    """Read what a checkpoint holds beside tensors.

    Args:
        path: The checkpoint.

    Returns:
        The values that ``save_checkpoint`` was given.

    Raises:
        CheckpointError: If it cannot be read, or is of another format than this version writes.
    """
    with _one_line(lambda: f"{path}: cannot be read; remove it to use an older one"):
        content = json.loads((path / VALUES).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{VALUES} is no object")
        found, values = content.get("format"), content.get("values", {})
    if found != FORMAT:
        raise CheckpointError(
            f"{path}: expected a checkpoint of format {FORMAT}, found "
            f"{'one of an earlier version, with pickled parts' if found is None else f'format {found!r:.20}'}: go on "
            "with the version that wrote it, or choose another output_dir to start anew"
        )
    return dict(values)


def load_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read a checkpoint's tensors into these of the same names, in place. All processes load together.

    Args:
        path: The checkpoint, written by any number of processes. Its files are safetensors, which hold no code.
        tensors: Name to tensor, as for ``save_checkpoint``.

    Raises:
        CheckpointError: If it cannot be read, lacks one of them, or has it in another shape.
    """
    with _one_line(lambda: f"{path}: cannot be read; remove it to use an older one"), _without_warnings():
        for file in path.glob("*.safetensors"):
            read_header(file)
        reader = HuggingFaceStorageReader(str(path))
        dcp.load(plain_tensors(tensors), storage_reader=reader, no_dist=not dist.is_initialized())


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take apart tensors that consist of others, as 8-bit optimizer states do.

    Args:
        tensors: Name to tensor.

    Returns:
        The same, with their parts as ``<name>/<part>``.
    """
    plain: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if isinstance(value, DTensor) or not hasattr(value, "__tensor_flatten__"):
            plain[name] = value
        else:
            parts, _ = value.__tensor_flatten__()
            plain |= {f"{name}/{part}": getattr(value, part) for part in parts}
    return plain


def _file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name to the number, from 1, of the file that it goes to."""
    numbers, number, size = {}, 1, 0
    for name, value in tensors.items():
        if size and size + value.nbytes > MAX_FILE_BYTES:
            number, size = number + 1, 0
        numbers[name], size = number, size + value.nbytes
    return numbers


def _remove(checkpoint: Path) -> None:
    """It is no checkpoint any more before its first file is gone."""
    if checkpoint.exists():
        aside = checkpoint.with_name(f"{_UNFINISHED}removal-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(checkpoint.replace(aside), ignore_errors=True)


def _not_written(target: Path, tensors: Mapping[str, Tensor]) -> str:
    taken = sum(value.nbytes for value in tensors.values()) / 2**20
    free = shutil.disk_usage(target.parent).free / 2**20
    return (
        f"{target}: cannot be written, the checkpoints before are kept; it takes {taken:.0f} MiB, {free:.0f} MiB are "
        "free there: make room and go on with --resume"
    )


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # a full disk needs the room
        raise


@contextmanager
def _one_line(message: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except (Exception, CheckpointException) as error:
        first: BaseException = error
        if isinstance(error, CheckpointException):
            first = next(iter(error.failures.values()))[0]
        reason = " ".join(str(first).split())[:200]
        raise CheckpointError(f"{message()} ({type(first).__name__}: {reason})") from error


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():  # that there is only one process is no surprise
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _wait_for_all(group: dist.ProcessGroup | None = None) -> None:
    if dist.is_initialized():
        dist.barrier(group)


def _sync(folder: Path) -> None:
    """Make the names in a folder last through a power cut."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

"""Checkpoints of a run: written whole or not at all by all processes together, read by any number of them.

A checkpoint is a folder with the shards of torch.distributed.checkpoint, ``run.json`` for what is no tensor, and
``sha256.json``, which shows damage to any of them.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from training.config.command_line import UserError
from training.loop.digests import damage, write_digests

VALUES = "run.json"
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
) -> Path:
    """Write ``folder/update-<n>`` through a temporary folder, then remove older ones.

    All processes must save together: each writes its shards, the first one the rest.

    Args:
        folder: Where checkpoints are.
        update: How many updates are done.
        tensors: The tensors by name.
        values: What else there is, as JSON knows it.
        keep: How many of the newest stay.
        for_good: Whether the checkpoint of an update stays however old it is.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: It cannot be written; the checkpoints before are untouched then.
    """
    target, temporary = folder / f"update-{update:08d}", folder / f"{_UNFINISHED}{update:08d}"
    alone, first = not dist.is_initialized(), not dist.is_initialized() or dist.get_rank() == 0
    with _one_line(lambda: _not_written(target, tensors)), _removed_on_failure(temporary):
        if first:
            for left in folder.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True)
        _wait_for_all()
        with _without_warnings():
            dcp.save(dict(tensors), storage_writer=FileSystemWriter(temporary), no_dist=alone)
        if first:
            with (temporary / VALUES).open("w", encoding="utf-8") as file:
                json.dump(values, file)
                file.flush()
                os.fsync(file.fileno())
        _wait_for_all()
        write_digests(temporary)
        if first:
            _sync(temporary)
            _remove(target)
            temporary.replace(target)
            _sync(folder)
            for old in list_checkpoints(folder)[:-keep]:
                if not for_good(update_of(old)):
                    _remove(old)
        _wait_for_all()
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / VALUES).is_file())


def newest_whole(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are what was written; None when there is no checkpoint.

    Newer ones that are damaged are set aside under the name ``damaged-...``, and said. All processes ask together.
    Raises CheckpointError when there are checkpoints and every one is damaged.
    """
    problems: dict[Path, str] = {}
    for checkpoint in reversed(list_checkpoints(folder)):
        problem = damage(checkpoint)
        if problem is None:
            for path, text in problems.items():
                aside = folder / f"damaged-{path.name}"
                say(f"{path} is damaged ({text}): it is now {aside.name}, going on from {checkpoint.name}")
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
    """How many updates were done when a checkpoint was taken."""
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
    if problem := damage(found[update]):
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
    """What a checkpoint holds beside tensors. Raises CheckpointError."""
    with _one_line(lambda: f"{path}: cannot be read; remove it to use an older one"):
        values = json.loads((path / VALUES).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{VALUES} is no object")
        return values


def load_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read a checkpoint's tensors of these names into these tensors, whole or sharded. Raises CheckpointError.

    All processes must load together. Nothing but tensors is read: what else a damaged file names is refused.
    """
    with _one_line(lambda: f"{path}: cannot be read; remove it to use an older one"), _without_warnings():
        dcp.load(dict(tensors), storage_reader=_TensorReader(path), no_dist=not dist.is_initialized())


class _TensorReader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Reads names, shapes and places of tensors; an entry that would be unpickled with its own code is refused."""

    KNOWN = frozenset(
        {
            ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "Metadata"),
            ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
            ("torch.distributed.checkpoint.metadata", "StorageMeta"),
            ("torch.distributed.checkpoint.metadata", "TensorProperties"),
            ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of ours holds")


def _remove(checkpoint: Path) -> None:
    """It is no checkpoint any more before its first file is gone."""
    if checkpoint.exists():
        aside = checkpoint.with_name(f"{_UNFINISHED}removal-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(checkpoint.replace(aside), ignore_errors=True)


def _not_written(target: Path, tensors: Mapping[str, Tensor]) -> str:
    taken = sum(value.numel() * value.element_size() for value in tensors.values()) / 2**20
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
        first = _of_the_system(first)
        reason = " ".join(str(first).split())[:200]
        raise CheckpointError(f"{message()} ({type(first).__name__}: {reason})") from error


def _of_the_system(error: BaseException) -> BaseException:
    """The operating system's error behind one; the error itself where there is none.

    PyTorch's writer tells of a full disk as of a position in the file that it did not expect.
    """
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__cause__ or behind.__context__
    return behind or error


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():  # that there is only one process is no surprise
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def _sync(folder: Path) -> None:
    """Make the names in a folder last through a power cut."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

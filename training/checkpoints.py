"""Checkpoints of a run: written whole or not at all by all processes together, read by any number of them.

A checkpoint is a folder with the shards of torch.distributed.checkpoint, and ``run.json`` for what is no tensor.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
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

from training.command_line import UserError

VALUES = "run.json"
_NAME = re.compile(r"update-(\d{8})")


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read: one line."""


def save_checkpoint(
    folder: Path, update: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], keep: int
) -> Path:
    """Write ``folder/update-<n>`` through a temporary folder, then remove all but the newest ``keep``.

    All processes must save together: each writes its shards, the first one the rest. values: as JSON knows them.
    Raises CheckpointError; the checkpoints before are untouched then.
    """
    target, temporary = folder / f"update-{update:08d}", folder / f".writing-{update:08d}"
    alone, first = not dist.is_initialized(), not dist.is_initialized() or dist.get_rank() == 0
    with _one_line(f"{target}: cannot be written, the checkpoints before are kept; free space or change output_dir"):
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        _wait_for_all()
        with _without_warnings():
            dcp.save(dict(tensors), storage_writer=FileSystemWriter(temporary), no_dist=alone)
        if first:
            with (temporary / VALUES).open("w", encoding="utf-8") as file:
                json.dump(values, file)
                file.flush()
                os.fsync(file.fileno())
            _sync(temporary)
            shutil.rmtree(target, ignore_errors=True)
            temporary.replace(target)
            _sync(folder)
            for old in list_checkpoints(folder)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
        _wait_for_all()
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / VALUES).is_file())


def load_values(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors. Raises CheckpointError."""
    with _one_line(f"{path}: cannot be read; remove it to use an older one"):
        values = json.loads((path / VALUES).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{VALUES} is no object")
        return values


def load_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read a checkpoint's tensors of these names into these tensors, whole or sharded. Raises CheckpointError.

    All processes must load together. Nothing but tensors is read: what else a damaged file names is refused.
    """
    with _one_line(f"{path}: cannot be read; remove it to use an older one"), _without_warnings():
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


@contextmanager
def _one_line(message: str) -> Iterator[None]:
    try:
        yield
    except (Exception, CheckpointException) as error:
        first: BaseException = error
        if isinstance(error, CheckpointException):
            first = next(iter(error.failures.values()))[0]
        reason = " ".join(str(first).split())[:200]
        raise CheckpointError(f"{message} ({type(first).__name__}: {reason})") from error


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

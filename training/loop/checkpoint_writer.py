"""Who writes the checkpoints of a run: itself, or a thread from a copy while the run goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from training.loop.checkpoints import CheckpointError, plain_tensors, save_checkpoint
from training.monitoring.monitor import warn


class CheckpointWriter:
    """Writes one checkpoint at a time. As a context, it is left when the last one is written.

    All processes of a run make one together, and save together. Threads that write tell each other over connections of
    their own, which nothing else uses: updates go on over the others.

    Args:
        background: Whether a thread writes, from a copy in host memory.
        timeout_minutes: How long threads of several processes wait for each other.
    """

    def __init__(self, background: bool, timeout_minutes: int = 60) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._group: dist.ProcessGroup | None = None
        if background and dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
        self._pending: Future[Path] | None = None

    def __enter__(self) -> CheckpointWriter:
        """Begin.

        Returns:
            The writer.
        """
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait for the last checkpoint; what else ends the run comes before an error of it."""
        try:
            self.wait()
        except CheckpointError as failed:
            if error is None:
                raise
            warn(str(failed))

    def save(
        self,
        folder: Path,
        update: int,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        keep: int,
        for_good: Callable[[int], bool],
    ) -> Path:
        """Write a checkpoint, or begin to once the one before is written; as ``save_checkpoint``.

        Args:
            folder: Where the checkpoints of a run lie.
            update: Number of updates so far.
            tensors: Name to tensor, which may change as soon as this returns.
            values: What is no tensor.
            keep: How many of the newest stay.
            for_good: Whether the checkpoint of an update stays however old it is.

        Returns:
            The folder of this checkpoint, which is there once it is written.

        Raises:
            CheckpointError: If it, or the one before, cannot be written.
        """
        self.wait()
        if self._pool is None:
            return save_checkpoint(folder, update, tensors, values, keep, for_good)
        copies = {name: value.detach().to("cpu", copy=True) for name, value in plain_tensors(tensors).items()}
        self._pending = self._pool.submit(save_checkpoint, folder, update, copies, values, keep, for_good, self._group)
        return folder / f"update-{update:08d}"

    def check(self) -> None:
        """Notice whether the checkpoint that was being written has failed.

        Raises:
            CheckpointError: If it has.
        """
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint is written.

        Raises:
            CheckpointError: If it cannot be.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
